import io

import numpy as np
import pytest
from open_clip.transform import image_transform
from PIL import Image

from clip_train.data.preprocessing import preprocess
from tests.conftest import encode_image
from tests.data.photos import encode, photographs


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(64, 48), (48, 64), (40, 40), (33, 97), (20, 20)])
def test_equals_open_clips(resize_mode, interpolation, size):
    encoded = encode_image(0, size)
    reference = image_transform(
        24, False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize_mode, interpolation=interpolation
    )
    expected = reference(Image.open(io.BytesIO(encoded))).permute(1, 2, 0).numpy() * 255
    assert np.abs(preprocess(encoded, 24, resize_mode, interpolation) - expected).max() <= 1


def test_photographs_equal_open_clips():
    reference = image_transform(224, False, mean=(0, 0, 0), std=(1, 1, 1))
    for photo in photographs():
        expected = reference(photo).permute(1, 2, 0).numpy() * 255
        assert np.abs(preprocess(encode(photo), 224) - expected).max() < 1.5
