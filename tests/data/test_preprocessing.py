import io
from typing import Any

import numpy as np
import pytest
from open_clip.transform import image_transform
from PIL import Image

from clip_train.data.preprocessing import preprocess
from tests.conftest import encode_image
from tests.data.photos import encode, photographs


def by_open_clip(image: Image.Image, size: int, **options: Any) -> np.ndarray:
    transform: Any = image_transform(size, False, mean=(0, 0, 0), std=(1, 1, 1), **options)
    return transform(image).permute(1, 2, 0).numpy() * 255


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(64, 48), (48, 64), (40, 40), (33, 97), (20, 20)])
def test_equals_open_clips(resize_mode, interpolation, size):
    encoded = encode_image(0, size)
    expected = by_open_clip(Image.open(io.BytesIO(encoded)), 24, resize_mode=resize_mode, interpolation=interpolation)
    assert np.abs(preprocess(encoded, 24, resize_mode, interpolation) - expected).max() <= 1


def test_photographs_equal_open_clips():
    for photo in photographs():
        expected = by_open_clip(photo, 224)
        assert np.abs(preprocess(encode(photo), 224) - expected).max() < 1.5


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (20000, 2)])
def test_lines_and_points_are_pictures_too(resize_mode, size):
    assert preprocess(encode(Image.new("RGB", size, "red")), 32, resize_mode).shape == (32, 32, 3)
