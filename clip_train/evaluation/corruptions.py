"""Pictures made worse, at the size that the model sees (as Hendrycks and Dietterich do, 2019, arXiv:1903.12261)."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageFilter

from clip_train.data.decoding import Pixels
from clip_train.errors import ConfigError

_BLUR_SIDE = 224


@dataclass(frozen=True)
class Corruptions:
    """Which, and how strong.

    Attributes:
        resize: shares of the side, in (0, 1): resized to that, and back.
        jpeg_quality: 1 to 100.
        gaussian_blur: standard deviations, in pixels of a picture of 224 x 224.

    Raises:
        ConfigError: there are none, or one is out of its range.
    """

    resize: list[float]
    jpeg_quality: list[int]
    gaussian_blur: list[float]

    def __post_init__(self) -> None:
        _check("resize", self.resize, lambda share: 0 < share < 1, "between 0 and 1")
        _check("jpeg_quality", self.jpeg_quality, lambda quality: 1 <= quality <= 100, "between 1 and 100")
        _check("gaussian_blur", self.gaussian_blur, lambda sigma: 0 < sigma < math.inf, "above 0")
        if not self.named():
            raise ConfigError("task.resize, task.jpeg_quality and task.gaussian_blur are empty: give one of them")

    def named(self) -> dict[str, Callable[[Pixels], Pixels]]:
        """The changes by name, `jpeg_quality=20`."""
        kinds = {"resize": resize, "jpeg_quality": compress, "gaussian_blur": blur}
        return {
            f"{kind}={strength:g}": partial(change, strength=strength)
            for kind, change in kinds.items()
            for strength in getattr(self, kind)
        }


def resize(pixels: Pixels, strength: float) -> Pixels:
    """Down to that share of the side, at least a pixel, and up again; both bicubic."""
    image = Image.fromarray(pixels)
    small = max(1, round(image.width * strength)), max(1, round(image.height * strength))
    return np.asarray(image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC))


def compress(pixels: Pixels, strength: int) -> Pixels:
    """Through a JPEG of that quality."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=strength)
    return np.asarray(Image.open(buffer))


def blur(pixels: Pixels, strength: float) -> Pixels:
    """By a Gaussian that is as wide in larger and smaller pictures as this one in a picture of 224 pixels."""
    radius = strength * len(pixels) / _BLUR_SIDE
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def _check(key: str, values: Sequence[float], fits: Callable[[float], bool], wanted: str) -> None:
    for value in values:
        if not fits(value):
            raise ConfigError(f"task.{key}: {value} is not {wanted}")
