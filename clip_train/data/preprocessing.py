"""What evaluation does to a picture; nothing is random. Modes and names are open_clip's."""

import numpy as np
from PIL import Image

from clip_train.data.decoding import MAX_IMAGE_PIXELS, Pixels, decode_rgb

_LONGEST_ASPECT = 32
RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def preprocess(
    encoded: bytes,
    size: int,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Pixels:
    """Decode in full and make a square.

    Args:
        encoded: the file's bytes.
        size: side of the result, in pixels.
        resize_mode: `shortest` resizes the shorter side to `size` and takes the central square; `longest` resizes the
            longer side and fills up with black; `squash` changes the aspect ratio.
        interpolation: `bicubic` or `bilinear`, both antialiased.
        max_pixels: larger images are refused.

    Raises:
        UnusableImage: the bytes are no readable image, or too large a one.
    """
    image = decode_rgb(encoded, max_pixels)
    if resize_mode == "shortest":
        image = _without_far_ends(image)
    width, height = _resized(image.width, image.height, size, resize_mode)
    if (width, height) != image.size:
        image = image.resize((width, height), INTERPOLATIONS[interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))  # what lies outside is black


def _without_far_ends(image: Image.Image) -> Image.Image:
    """The middle of a picture that is very long: resized whole, a line of 100,000 pixels would take gigabytes."""
    longest = _LONGEST_ASPECT * min(image.size)
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)) if (width, height) != image.size else image


def _resized(width: int, height: int, size: int, resize_mode: str) -> tuple[int, int]:
    if resize_mode == "squash":
        return size, size
    if resize_mode == "longest":
        longer = max(width, height)
        return max(1, round(width * size / longer)), max(1, round(height * size / longer))
    shorter = min(width, height)
    return size * width // shorter, size * height // shorter
