import io

import numpy as np
import pytest
from PIL import Image

from clip_train.errors import ConfigError
from clip_train.shard_tools.pictures import Resizing
from tests.conftest import encode_image
from tests.shard_tools.options import options


def resizing(**changes) -> Resizing:
    return options(Resizing, "make", **changes)


@pytest.mark.parametrize(("format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_without_a_size_every_byte_stays(format, extension):
    encoded = encode_image(1, (20, 16), format)
    assert resizing()(encoded) == (extension, encoded, 20, 16)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_formats_that_loaders_do_not_look_for_become_png(format):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 2, (8, 9, 3), dtype=np.uint8) * 255
    Image.fromarray(pixels).save(buffer, format)
    picture = resizing()(buffer.getvalue())
    assert picture.extension == "png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.encoded))), pixels)


@pytest.mark.parametrize(
    ("changes", "size", "expected"),
    [
        ({"image_size": 10}, (40, 20), (20, 10)),
        ({"image_size": 10}, (20, 40), (10, 20)),
        ({"image_size": 10, "resize_mode": "keep_ratio_largest"}, (40, 20), (10, 5)),
        ({"image_size": 10, "resize_mode": "keep_ratio_largest"}, (400, 2), (10, 1)),
        ({"image_size": 30}, (40, 20), (40, 20)),
        ({"image_size": 30, "resize_only_if_bigger": False}, (40, 20), (60, 30)),
    ],
)
def test_sizes(changes, size, expected):
    picture = resizing(**changes)(encode_image(1, size))
    assert (picture.width, picture.height) == expected
    assert Image.open(io.BytesIO(picture.encoded)).size == expected
    assert picture.extension == ("png" if size == expected else "jpg")


def test_format_and_quality():
    encoded = encode_image(1, (64, 64))
    low, high = (resizing(image_size=32, encode_quality=quality)(encoded) for quality in (20, 95))
    assert len(low.encoded) < len(high.encoded) / 2
    webp = resizing(image_size=32, encode_format="webp")(encoded)
    assert (webp.extension, Image.open(io.BytesIO(webp.encoded)).format) == ("webp", "WEBP")


def test_a_picture_that_lies_on_its_side_is_set_upright_when_it_is_encoded_anew():
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    picture = resizing(image_size=10)(buffer.getvalue())
    assert (picture.width, picture.height) == (10, 20)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damage_is_found_even_if_nothing_is_resized(format):
    encoded = encode_image(1, (64, 64), format)
    with pytest.raises(OSError, match="unreadable"):
        resizing()(encoded[: len(encoded) // 2])


@pytest.mark.parametrize(
    "change",
    [{"image_size": 0}, {"resize_mode": "border"}, {"encode_format": "png"}, {"encode_quality": 0}],
)
def test_values_that_cannot_be(change):
    ((name, value),) = change.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        resizing(**change)
