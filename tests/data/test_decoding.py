import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from clip_train.data.decoding import EncodedImage, UnusableImage, decode_rgb, reduction_for
from tests.conftest import encode_image
from tests.data.photos import encode, photographs


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    format = {"CMYK": "JPEG"}.get(mode, "PNG")
    if mode == "I;16":
        image = Image.new(mode, (9, 7), 0x8000)
    else:
        image = Image.new("RGB", (9, 7), "#808080").convert(mode, palette=Image.Palette.ADAPTIVE)
    for decoded in (decode_rgb(encode(image, format)), Image.fromarray(whole(encode(image, format)))):
        assert (decoded.mode, decoded.size) == ("RGB", (9, 7))
        assert mode == "1" or np.abs(np.asarray(decoded).astype(int) - 128).max() <= 1


def test_transparent_is_white():
    assert decode_rgb(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))).getpixel((1, 1)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    assert decode_rgb(encode(palette, "GIF", transparency=0)).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_in_full_is_pillows(mode):
    for photo in photographs():
        encoded = encode(photo.convert(mode), "JPEG", quality=80)
        assert np.array_equal(whole(encoded), np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_turned_by_exif_comes_out_upright(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(photographs()[0].resize((64, 40)), format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    image = EncodedImage(encoded)
    assert (image.width, image.height) == expected.size == ((40, 64) if orientation > 4 else (64, 40))
    assert np.array_equal(whole(encoded), np.asarray(expected))


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_reduced_decoding_is_aligned_with_the_whole(reduction):
    photo = photographs()[2].crop((0, 0, 640, 427))  # the last row of squares is incomplete
    image = EncodedImage(encode(photo, "JPEG", quality=90))
    box = (16, 64, 640, 427)
    part = image.decode(box, reduction)
    assert part.shape == (-(-(427 - 64) // reduction), (640 - 16) // reduction, 3)
    expected = photo.crop((16, 64, 640, 424)).resize((624 // reduction, 360 // reduction), Image.Resampling.BOX)
    assert np.abs(part[: 360 // reduction].astype(int) - np.asarray(expected)).mean() < 4


def test_only_as_many_pixels_as_the_crop_needs():
    assert [reduction_for(side, side + 5, 224) for side in (100, 224, 447, 448, 900, 1791, 1792, 9000)] == [
        *(1, 1, 1, 2, 4, 4, 8, 8)
    ]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_images_are_unusable(format):
    encoded = encode_image(0, (64, 64), format)
    for broken in (b"", b"not an image", encoded[: len(encoded) // 2], encoded[:20]):
        with pytest.raises(UnusableImage, match="unreadable image") as error:
            whole(broken)
        assert error.value.kind == "image_unreadable"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF"])
def test_too_large_an_image_is_refused_before_it_is_decoded(format):
    encoded = encode(Image.new("L", (3000, 2000)), format)
    with pytest.raises(UnusableImage, match="3000 x 2000 pixels, more than 5000000") as error:
        EncodedImage(encoded, max_pixels=5_000_000)
    assert error.value.kind == "image_too_large"
    assert EncodedImage(encoded, max_pixels=6_000_000).width == 3000


def test_the_limit_may_be_above_pillows_own():
    encoded = bytearray(encode(Image.new("L", (8, 8)), "PNG"))
    encoded[16:24] = struct.pack(">II", 15_000, 15_000)  # width and height in the header, whose checksum follows
    encoded[29:33] = struct.pack(">I", zlib.crc32(encoded[12:29]))
    for max_pixels, kind in ((224_000_000, "image_too_large"), (225_000_000, "image_unreadable")):
        with pytest.raises(UnusableImage) as error:
            EncodedImage(bytes(encoded), max_pixels)
        assert error.value.kind == kind


def whole(encoded: bytes) -> np.ndarray:
    image = EncodedImage(encoded)
    return image.decode((0, 0, image.width, image.height))


def test_exif_is_found_behind_other_segments_and_filling():
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(photographs()[0].resize((64, 40)), "JPEG", exif=exif)
    long_note = b"\xff\xfe\xff\xff" + bytes(65533)
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 6) + b"\xff\xda\0\0\0\0"  # looks as if the picture began
    for inserted in (b"", comment, b"\xff" * 3, long_note):
        image = EncodedImage(encoded[:2] + inserted + encoded[2:])
        assert (image.width, image.height) == (40, 64)
