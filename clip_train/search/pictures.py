"""The pictures of samples that were found, small."""

import io
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image

from clip_train.data.decoding import UnusableImage, decode_rgb
from clip_train.data.remote import scheme_of

_QUALITY = 85


def read_picture(row: Mapping[str, Any]) -> bytes | None:
    """The encoded picture that a row of metadata names; None if it is not on this machine."""
    shard, offset, size, path = (row.get(name) for name in ("shard", "offset", "size", "image_path"))
    try:
        if shard:
            if not isinstance(offset, int) or not isinstance(size, int) or offset < 0 or scheme_of(str(shard)):
                return None
            with open(str(shard), "rb") as file:
                return os.pread(file.fileno(), size, offset)
        if isinstance(path, str) and os.path.isfile(path):
            with open(path, "rb") as file:
                return file.read()
    except OSError:
        pass
    return None


def thumbnail(encoded: bytes | None, side: int) -> bytes | None:
    """A JPEG of at most `side` pixels either way; None if there is no readable picture."""
    if encoded is None:
        return None
    try:
        image = decode_rgb(encoded)
    except UnusableImage:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
