"""Pictures as they go into a shard: untouched, or smaller and encoded anew."""

import io
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from clip_train.data.decoding import EncodedImage, reduction_for
from clip_train.errors import ConfigError

RESIZE_MODES = ("keep_ratio", "keep_ratio_largest")
_ENCODERS = {"jpg": "JPEG", "webp": "WEBP"}
_LEFT_TO_FILTER = 2  # a JPEG is decoded to no less than twice the size that is wanted: much faster, and looks the same
_MAGIC = {"jpg": (b"\xff\xd8\xff", 0), "png": (b"\x89PNG\r\n\x1a\n", 0), "webp": (b"WEBP", 8)}


class Picture(NamedTuple):
    """An encoded picture with the extension of its format; width and height in pixels."""

    extension: str
    encoded: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Resizing:
    """How pictures are changed; the names are img2dataset's.

    Attributes:
        image_size: pixels; None leaves pictures as they are.
        resize_mode: which side gets them: the shorter (`keep_ratio`) or the longer (`keep_ratio_largest`).
        resize_only_if_bigger: leave smaller pictures untouched.
        encode_format: `jpg` or `webp`, of the pictures that change.
        encode_quality: 1 to 100.

    Raises:
        ConfigError: a value cannot be used.
    """

    image_size: int | None
    resize_mode: str
    resize_only_if_bigger: bool
    encode_format: str
    encode_quality: int

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"image_size={self.image_size} is neither a number of pixels nor null")
        if self.resize_mode not in RESIZE_MODES:
            raise ConfigError(f"resize_mode={self.resize_mode} is none of {', '.join(RESIZE_MODES)}")
        if self.encode_format not in _ENCODERS:
            raise ConfigError(f"encode_format={self.encode_format} is none of {', '.join(_ENCODERS)}")
        if not 1 <= self.encode_quality <= 100:
            raise ConfigError(f"encode_quality={self.encode_quality} is not between 1 and 100")

    def __call__(self, encoded: bytes) -> Picture:
        """Raises OSError if the bytes are no readable image; damage is found even if they stay as they are."""
        image = EncodedImage(encoded)
        if self.image_size is None:
            return _as_it_is(encoded, image)
        size = image.width, image.height
        side = min(size) if self.resize_mode == "keep_ratio" else max(size)
        if side == self.image_size or (self.resize_only_if_bigger and side < self.image_size):
            return _as_it_is(encoded, image)
        width, height = (max(1, round(length * self.image_size / side)) for length in size)
        reduction = reduction_for(*size, _LEFT_TO_FILTER * min(width, height))
        pixels = Image.fromarray(image.decode((0, 0, *size), reduction))
        resized = pixels.resize((width, height), Image.Resampling.LANCZOS)
        smaller = _encode(resized, _ENCODERS[self.encode_format], quality=self.encode_quality)
        return Picture(self.encode_format, smaller, width, height)


def _as_it_is(encoded: bytes, image: EncodedImage) -> Picture:
    size = image.width, image.height
    pixels = image.decode((0, 0, *size))
    for extension, (magic, offset) in _MAGIC.items():
        if encoded.startswith(magic, offset):
            return Picture(extension, encoded, *size)
    return Picture("png", _encode(Image.fromarray(pixels), "PNG"), *size)  # GIF, BMP, TIFF: loaders look for none


def _encode(image: Image.Image, format: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()
