import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from clip_train.data.augmentation import Augmentation, _aligned, _color_matrix
from clip_train.data.decoding import EncodedImage, reduction_for
from clip_train.data.keyed_random import keyed_uniforms
from tests.conftest import encode_image
from tests.data.photos import encode, photographs, psnr

DRAWS = keyed_uniforms(1, np.arange(300), count=Augmentation.num_draws).tolist()


def augmented(
    augmentation: Augmentation, encoded: bytes, size: int, draws: list[float], fast: bool = True
) -> np.ndarray:
    out = np.empty((size, size, 3), dtype=np.uint8)
    augmentation.finish(augmentation.crop(EncodedImage(encoded), size, draws, fast), draws, out)
    return out


def by_pillow(augmentation: Augmentation, encoded: bytes, size: int, draws: list[float]) -> np.ndarray:
    """All of the image decoded and its crop resized, by Pillow alone."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    box = augmentation._crop_box(image.width, image.height, draws)
    step = reduction_for(box[2] - box[0], box[3] - box[1], size)
    box = _aligned(box, step, image.width, image.height)
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("enlarged", [1, 2, 4])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.3, 0.9)])
def test_photographs_are_pillows_in_full_and_close_to_it_fast(enlarged, scale):
    augmentation = Augmentation(scale=scale)
    for number, photo in enumerate(photographs()):
        photo = photo.resize((enlarged * photo.width, enlarged * photo.height), Image.Resampling.BICUBIC)
        encoded = encode(photo, "JPEG", quality=90)
        for draws in DRAWS[4 * number : 4 * number + 4]:
            reference = by_pillow(augmentation, encoded, 224, draws)
            exact = augmented(augmentation, encoded, 224, draws, fast=False)
            assert np.abs(exact.astype(int) - reference).mean() <= 1
            assert psnr(augmented(augmentation, encoded, 224, draws), reference) >= 30


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
def test_other_formats_are_pillows(format):
    encoded = encode(photographs()[2].resize((200, 150)), format)
    for draws in DRAWS[:3]:
        reference = by_pillow(Augmentation(), encoded, 64, draws)
        assert np.abs(augmented(Augmentation(), encoded, 64, draws).astype(int) - reference).max() <= 1


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
    pixels = augmented(Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0)), encoded, 32, DRAWS[0])
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(encoded))))


def test_flip_and_gray():
    encoded = encode_image(3, (32, 32))
    whole = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    plain = augmented(whole, encoded, 32, DRAWS[0])
    assert np.array_equal(augmented(replace(whole, flip_prob=1.0), encoded, 32, DRAWS[0]), plain[:, ::-1])
    gray = augmented(replace(whole, gray_scale_prob=1.0), encoded, 32, DRAWS[0])
    assert (gray == gray[..., :1]).all()


def test_jitter_stays_within_its_bounds():
    encoded = encode(Image.new("RGB", (8, 8), (100, 100, 100)))
    augmentation = Augmentation(color_jitter=(0.5, 0.0, 0.0, 0.0), color_jitter_prob=1.0)
    values = {int(augmented(augmentation, encoded, 8, draws)[0, 0, 0]) for draws in DRAWS}
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


def test_erasing_fills_rectangles_with_noise():
    encoded = encode(Image.new("RGB", (64, 64), (10, 20, 30)))
    augmentation = Augmentation(re_prob=1.0, re_count=2)
    shares = []
    for draws in DRAWS[:40]:
        erased = (augmented(augmentation, encoded, 64, draws) != [10, 20, 30]).any(axis=2)
        shares.append(erased.mean())
    assert 0.01 < min(shares) < max(shares) <= 0.34
    assert np.mean(shares) > 0.08
    again, once = (augmented(augmentation, encoded, 64, DRAWS[0]) for _ in range(2))
    assert np.array_equal(again, once)


def test_randaugment_is_keyed_and_leaves_the_generator_alone():
    encoded = encode(photographs()[0].resize((64, 64)), "PNG")
    augmentation = Augmentation(randaugment={"num_ops": 2, "magnitude": 15})
    torch.manual_seed(3)
    before = torch.get_rng_state()
    pictures = [augmented(augmentation, encoded, 32, draws) for draws in DRAWS[:8]]
    assert torch.equal(before, torch.get_rng_state())
    assert all(np.array_equal(p, augmented(augmentation, encoded, 32, d)) for p, d in zip(pictures, DRAWS))
    plain = [augmented(Augmentation(), encoded, 32, draws) for draws in DRAWS[:8]]
    assert sum(not np.array_equal(a, b) for a, b in zip(pictures, plain)) >= 5
