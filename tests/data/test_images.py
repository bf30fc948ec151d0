import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from clip_train.data.images import Augmentation, _color_matrix, decode_rgb, resize_center_crop
from clip_train.data.keyed_random import keyed_uniforms
from tests.conftest import encode_image

DRAWS = keyed_uniforms(1, np.arange(300), count=Augmentation.num_draws).tolist()


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (40, 40), (33, 97)])
def test_evaluation_equals_torchvision(size):
    encoded = encode_image(0, size)
    reference = v2.Compose([v2.Resize(24, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(24)])
    expected = np.asarray(reference(Image.open(io.BytesIO(encoded))))
    assert np.abs(resize_center_crop(encoded, 24).astype(int) - expected).max() <= 1


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 299))
def test_crop_lies_inside_and_has_the_asked_shape(width, height, number):
    augmentation = Augmentation(scale=(0.3, 0.8))
    left, top, right, bottom = augmentation._crop_box(width, height, DRAWS[number])
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) >= 20 and max(width, height) < 1.5 * min(width, height):
        assert 0.25 < (right - left) * (bottom - top) / (width * height) < 0.9


def test_crop_is_distributed_as_torchvisions():
    augmentation = Augmentation(scale=(0.2, 1.0))
    draws = keyed_uniforms(2, np.arange(3000), count=Augmentation.num_draws).tolist()
    ours = np.array([augmentation._crop_box(60, 40, draw) for draw in draws])
    image = torch.zeros(3, 40, 60)
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(8, scale=(0.2, 1.0))
    theirs = []
    for _ in range(3000):
        crop = reference.make_params([image])
        theirs.append([crop["left"], crop["top"], crop["left"] + crop["width"], crop["top"] + crop["height"]])
    assert np.allclose(ours.mean(0), np.mean(theirs, 0), atol=0.8)
    assert np.allclose(ours.std(0), np.std(theirs, 0), atol=0.8)


def test_whole_picture_without_augmentation():
    encoded = encode_image(3, (32, 32))
    pixels = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))(encoded, 32, DRAWS[0])
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(encoded))))


def test_flip_and_gray():
    encoded = encode_image(3, (32, 32))
    whole = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    plain = whole(encoded, 32, DRAWS[0])
    assert np.array_equal(replace(whole, flip_prob=1.0)(encoded, 32, DRAWS[0]), plain[:, ::-1])
    gray = replace(whole, gray_scale_prob=1.0)(encoded, 32, DRAWS[0])
    assert (gray == gray[..., :1]).all()


def test_jitter_stays_within_its_bounds():
    encoded = encode(Image.new("RGB", (8, 8), (100, 100, 100)))
    augmentation = Augmentation(color_jitter=(0.5, 0.0, 0.0, 0.0), color_jitter_prob=1.0)
    values = {int(augmentation(encoded, 8, draws)[0, 0, 0]) for draws in DRAWS}
    assert 50 <= min(values) < 60
    assert 140 < max(values) <= 150


def test_contrast_and_saturation_as_defined():
    image = Image.fromarray(np.array([[[90, 60, 30], [30, 60, 90]]], dtype=np.uint8))
    augmentation = Augmentation(color_jitter=(0.0, 0.5, 0.0, 0.0), color_jitter_prob=1.0)
    doubled = np.asarray(augmentation._jitter(image, [0.5, 1.0, 0.5, 0.5]))
    assert np.array_equal(doubled, [[[105, 60, 15], [15, 60, 105]]])  # 1.5 times as far from the mean, 60
    augmentation = Augmentation(color_jitter=(0.0, 0.0, 1.0, 0.0), color_jitter_prob=1.0)
    assert (np.asarray(augmentation._jitter(image, [0.5, 0.5, 0.0, 0.5])) == 60).all()  # no colour left


def test_a_third_of_a_turn_of_hue_makes_red_green():
    assert np.allclose(_color_matrix(1.0, 1 / 3) @ [1, 0, 0], [0, 1, 0])
    assert np.allclose(_color_matrix(1.0, 0.2) @ [1, 1, 1], [1, 1, 1])
    assert np.allclose(_color_matrix(1.0, 0.2) @ _color_matrix(1.0, -0.2), np.eye(3))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    format = {"CMYK": "JPEG"}.get(mode, "PNG")
    image = Image.new("I;16", (9, 7), 30000) if mode == "I;16" else Image.new("RGB", (9, 7), "gray").convert(mode)
    decoded = decode_rgb(encode(image, format))
    assert (decoded.mode, decoded.size) == ("RGB", (9, 7))


def test_transparent_is_white():
    assert decode_rgb(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))).getpixel((1, 1)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    assert decode_rgb(encode(palette, "GIF", transparency=0)).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_images_raise_oserror(format):
    encoded = encode_image(0, (64, 64), format)
    for broken in (b"", b"not an image", encoded[: len(encoded) // 2], encoded[:20]):
        with pytest.raises(OSError, match="unreadable image"):
            decode_rgb(broken)
