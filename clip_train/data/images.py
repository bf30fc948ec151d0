"""Encoded images to uint8 pixels, for training (random, keyed by position) and for evaluation (fixed)."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_CROP_TRIES = 10
_DRAWS_PER_SAMPLE = 2 * _CROP_TRIES + 9

Pixels = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class Augmentation:
    """What training does to a picture. The names and defaults of crop and jitter are open_clip's.

    Attributes:
        scale: area of the crop, as a share of the picture's, drawn uniformly.
        ratio: aspect ratio of the crop, drawn log-uniformly.
        flip_prob: probability of a left-right flip; captions often say left and right, so none by default.
        color_jitter: greatest change of brightness, contrast, saturation (factors 1 +- x) and hue (turns +- x). Hue
            turns about the grey axis of RGB, not in HSV, so that the four are one linear map.
        color_jitter_prob: probability of the jitter.
        gray_scale_prob: probability of dropping all colour.
    """

    scale: Sequence[float] = (0.9, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.0
    color_jitter: Sequence[float] = field(default=(0.0, 0.0, 0.0, 0.0))
    color_jitter_prob: float = 0.0
    gray_scale_prob: float = 0.0

    num_draws = _DRAWS_PER_SAMPLE

    def __call__(self, encoded: bytes, size: int, draws: Sequence[float]) -> Pixels:
        """Decode, crop to `size` x `size`, change colours.

        Args:
            encoded: the file's bytes.
            size: side of the result, in pixels.
            draws: `num_draws` numbers in [0, 1) that decide everything random.

        Raises:
            OSError: the bytes are no readable image.
        """
        image = decode_rgb(encoded)
        crop_draws, (flip, jitter, *factors, gray) = draws[: 2 * _CROP_TRIES + 2], draws[2 * _CROP_TRIES + 2 :]
        box = self._crop_box(image.width, image.height, crop_draws)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if flip < self.flip_prob:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if jitter < self.color_jitter_prob:
            image = self._jitter(image, factors)
        if gray < self.gray_scale_prob:
            image = image.convert("L").convert("RGB")
        return np.asarray(image)

    def _crop_box(self, width: int, height: int, draws: Sequence[float]) -> tuple[int, int, int, int]:
        """The crop of torchvision's RandomResizedCrop: first fit of ten tries, else the central crop that fits."""
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(_CROP_TRIES):
            area = width * height * _between(self.scale[0], self.scale[1], draws[2 * attempt])
            aspect = math.exp(_between(log_ratio[0], log_ratio[1], draws[2 * attempt + 1]))
            crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left = int(draws[-2] * (width - crop_width + 1))
                top = int(draws[-1] * (height - crop_height + 1))
                return left, top, left + crop_width, top + crop_height
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        crop_width = min(width, round(height * aspect))
        crop_height = min(height, round(width / aspect))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return left, top, left + crop_width, top + crop_height

    def _jitter(self, image: Image.Image, draws: Sequence[float]) -> Image.Image:
        """All four changes are one linear map of (red, green, blue), and cost one pass over the picture."""
        brightness, contrast, saturation, hue = (
            _between(-greatest, greatest, draw) for greatest, draw in zip(self.color_jitter, draws, strict=True)
        )
        linear = (1 + brightness) * (1 + contrast) * _color_matrix(1 + saturation, hue)
        mean = np.asarray(image).mean() * (1 + brightness)
        offset = -contrast * mean  # contrast leaves the mean where it is
        return image.convert("RGB", tuple(np.column_stack([linear, [offset] * 3]).ravel().tolist()))


def _color_matrix(saturation: float, hue: float) -> np.ndarray:
    """Scale colours away from the grey axis by `saturation` and turn them about it by `hue` turns."""
    gray = np.full((3, 3), 1 / 3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # the axis (1, 1, 1), as a cross product
    turn = math.cos(2 * math.pi * hue) * (np.eye(3) - gray) + math.sin(2 * math.pi * hue) * across
    return gray + saturation * turn


def resize_center_crop(encoded: bytes, size: int) -> Pixels:
    """Evaluation's picture: shorter side to `size` (bicubic), then the central square. Raises OSError as above."""
    image = decode_rgb(encoded)
    shorter = min(image.width, image.height)
    width, height = size * image.width // shorter, size * image.height // shorter
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def decode_rgb(encoded: bytes) -> Image.Image:
    """Decode to RGB, transparent parts on white.

    Raises:
        OSError: the bytes are no readable image, or one too large to be meant.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
        image.load()
    except Exception as error:  # a damaged file raises what its decoder happens to stumble over
        raise OSError(f"unreadable image: {error}") from error
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * draw
