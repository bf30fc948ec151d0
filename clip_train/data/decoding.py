"""Encoded images to RGB pixels: JPEG by libjpeg-turbo, no larger than needed, everything else by Pillow."""

import io
import threading

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# What Pillow warns of as a decompression bomb.
MAX_IMAGE_PIXELS = 89_478_485
_REDUCTIONS = (8, 4, 2)  # by these libjpeg-turbo decodes faster than in full; by other eighths it is slower
_EXIF_WITHIN = 1 << 16
_LARGEST_KEPT = 1 << 25

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit; ours is `max_pixels`, and is looked at before anything is decoded

Pixels = UInt8[np.ndarray, "height width 3"]
Box = tuple[int, int, int, int]  # left, top, right, bottom


class UnusableImage(OSError):
    """Bytes that are no image one could train on.

    Attributes:
        kind: `image_unreadable` or `image_too_large`.
    """

    def __init__(self, message: str, kind: str = "image_unreadable") -> None:
        super().__init__(message)
        self.kind = kind


class EncodedImage:
    """An image whose size is known and whose pixels are decoded when it is known how many are needed.

    Args:
        encoded: the file's bytes.
        max_pixels: larger images are refused before they are decoded.

    Attributes:
        width, height: in pixels, upright.

    Raises:
        UnusableImage: no readable image, or too large a one.
    """

    def __init__(self, encoded: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
        self._encoded, self._max_pixels = encoded, max_pixels
        self._rgb: Pixels | None = None
        if size := _plain_jpeg_size(encoded):
            self.width, self.height = size
            _check_size(*size, max_pixels)
        else:
            self._rgb = np.asarray(decode_rgb(encoded, max_pixels))
            self.height, self.width = self._rgb.shape[:2]

    def decode(self, box: Box, reduction: int = 1, fast: bool = False) -> Pixels:
        """The pixels inside the box, as a copy.

        Args:
            box: multiples of `reduction`, but for the right and lower edge of the image.
            reduction: 1, 2, 4 or 8: the side of the squares of which a JPEG gives one pixel; others come in full.
            fast: let a JPEG's colours be interpolated in the simplest way, and its cosine transform be rounded more.

        Raises:
            UnusableImage: the image is damaged.
        """
        left, top, right, bottom = box
        pixels = self._rgb
        if pixels is None:
            pixels = self._decode_jpeg(reduction, fast)
            left, top, right, bottom = (
                left // reduction,
                top // reduction,
                -(-right // reduction),
                -(-bottom // reduction),
            )
        return np.array(pixels[top:bottom, left:right])

    def _decode_jpeg(self, reduction: int, fast: bool) -> Pixels:
        """All of it, in memory that the next image will overwrite."""
        height, width = -(-self.height // reduction), -(-self.width // reduction)
        options = {"min_height": height, "min_width": width, "fastdct": fast, "fastupsample": fast, "strict": True}
        try:
            return simplejpeg.decode_jpeg(self._encoded, **options, buffer=_scratch.of(height * width * 3))
        except ValueError:  # damaged, or odd in a way that Pillow may be able to read
            image = decode_rgb(self._encoded, self._max_pixels)
            if image.size != (self.width, self.height):
                raise UnusableImage("unreadable image: its size is not what its header says") from None
            return np.asarray(image if reduction == 1 else image.resize((width, height), Image.Resampling.BOX))


class _Scratch(threading.local):
    """Memory to decode into, one piece per thread: fresh memory from the system costs a tenth of the time."""

    buffer = np.empty(0, dtype=np.uint8)

    def of(self, size: int) -> np.ndarray:
        if size > _LARGEST_KEPT:
            return np.empty(size, dtype=np.uint8)
        if len(self.buffer) < size:
            self.buffer = np.empty(size, dtype=np.uint8)
        return self.buffer


_scratch = _Scratch()


def reduction_for(width: int, height: int, size: int) -> int:
    """The most by which a crop can be reduced in decoding and still have `size` pixels each way."""
    return next((factor for factor in _REDUCTIONS if min(width, height) >= factor * size), 1)


def decode_rgb(encoded: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode all of an image by Pillow: upright, 8 bits per channel, transparent parts on white.

    Raises:
        UnusableImage: no readable image, or too large a one.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        _check_size(image.width, image.height, max_pixels)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except UnusableImage:
        raise
    except Exception as error:  # a damaged file raises what its decoder happens to stumble over
        raise UnusableImage(f"unreadable image: {str(error).partition(' <_io')[0]}") from error
    if image.mode.startswith("I"):  # 16 bits per pixel
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _plain_jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that libjpeg-turbo decodes to RGB and that stands upright; None for all others."""
    if not encoded.startswith(b"\xff\xd8") or (_has_exif(encoded) and _is_turned(encoded)):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None
    return (int(width), int(height)) if colorspace in ("YCbCr", "Gray", "RGB") else None


def _has_exif(encoded: bytes) -> bool:
    """Whether a JPEG may have an Exif segment. To go from segment to segment is quicker than to search."""
    place = 2
    while encoded[place : place + 1] == b"\xff":
        marker = encoded[place + 1 : place + 2]
        if marker == b"\xda":  # the picture begins
            return False
        if marker == b"\xe1" and encoded.startswith(b"Exif\0", place + 4):
            return True
        place += 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")
    return encoded.find(b"Exif\0", 0, _EXIF_WITHIN) >= 0  # not as it should be: search


def _is_turned(encoded: bytes) -> bool:
    try:
        return Image.open(io.BytesIO(encoded), formats=("JPEG",)).getexif().get(0x0112, 1) != 1
    except Exception:
        return False  # damaged: decoding will tell


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UnusableImage(f"{width} x {height} pixels, more than {max_pixels}", "image_too_large")
