"""What training does to a picture: a random crop, and whatever changes of colour and content are asked for.

Everything random follows from numbers that are keyed by the sample's position, and pixels stay bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from clip_train.data.decoding import Box, EncodedImage, Pixels, reduction_for
from clip_train.data.keyed_random import keyed_bits, keyed_uniforms
from clip_train.errors import ConfigError

_CROP_TRIES = 10
_CROP_DRAWS = 2 * _CROP_TRIES + 2
_DRAWS_PER_SAMPLE = _CROP_DRAWS + 9
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Augmentation:
    """What training does to a picture. The names and defaults of crop, jitter and erasing are open_clip's.

    Attributes:
        scale: area of the crop, as a share of the picture's, drawn uniformly.
        ratio: aspect ratio of the crop, drawn log-uniformly.
        flip_prob: probability of a left-right flip; captions often say left and right, so none by default.
        randaugment: `num_ops` and `magnitude` of torchvision's RandAugment; None for none.
        color_jitter: greatest change of brightness, contrast, saturation (factors 1 +- x) and hue (turns +- x). Hue
            turns about the grey axis of RGB, not in HSV, so that the four are one linear map.
        color_jitter_prob: probability of the jitter.
        gray_scale_prob: probability of dropping all colour.
        re_prob: probability of random erasing (Zhong et al., 2017): rectangles of noise, of 2 to 33 % of the area.
        re_count: how many rectangles.
    """

    scale: Sequence[float] = (0.9, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.0
    randaugment: Mapping[str, int] | None = None
    color_jitter: Sequence[float] = field(default=(0.0, 0.0, 0.0, 0.0))
    color_jitter_prob: float = 0.0
    gray_scale_prob: float = 0.0
    re_prob: float = 0.0
    re_count: int = 1

    num_draws = _DRAWS_PER_SAMPLE

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be used."""
        _check("scale", self.scale, 2, 0, 1)
        _check("ratio", self.ratio, 2, 1e-3)
        _check("color_jitter", self.color_jitter, 4)
        for name in ("flip_prob", "color_jitter_prob", "gray_scale_prob", "re_prob"):
            _check(name, [getattr(self, name)], 1, 0, 1)
        if not isinstance(self.re_count, int) or self.re_count < 1:
            raise ConfigError(f"data.augmentation.re_count={self.re_count} is not a number of at least 1")
        if self.randaugment is not None and set(self.randaugment) != {"num_ops", "magnitude"}:
            raise ConfigError(f"data.augmentation.randaugment={self.randaugment} is not {{num_ops: .., magnitude: ..}}")

    def crop(self, image: EncodedImage, size: int, draws: Sequence[float], fast: bool = True) -> Pixels:
        """The pixels of a random crop, at least `size` each way if the picture has them.

        Args:
            size: side of what will be made of it, in pixels.
            draws: `num_draws` numbers in [0, 1) that decide everything random.
            fast: decode a JPEG no larger than needed; else in full. The crop is the same.

        Raises:
            UnusableImage: the image is damaged.
        """
        box = self._crop_box(image.width, image.height, draws)
        reduction = reduction_for(box[2] - box[0], box[3] - box[1], size)
        box = _aligned(box, reduction, image.width, image.height)
        return image.decode(box, reduction if fast else 1, fast)

    def finish(self, crop: Pixels, draws: Sequence[float], out: Pixels) -> None:
        """Resize the crop to `out` and change what is to be changed."""
        flip, jitter, *factors, gray, erase, seed = draws[_CROP_DRAWS:]
        resize_bicubic(crop, out)
        if flip < self.flip_prob:
            out[:] = out[:, ::-1].copy()
        if self.randaugment is not None:
            out[:] = _randaugment(out, seed, **self.randaugment)
        if jitter < self.color_jitter_prob:
            out[:] = self._jitter(Image.fromarray(out), factors)
        if gray < self.gray_scale_prob:
            out[:] = np.asarray(Image.fromarray(out).convert("L"))[..., None]
        if erase < self.re_prob:
            _erase(out, seed, self.re_count)

    def _crop_box(self, width: int, height: int, draws: Sequence[float]) -> Box:
        """The crop of torchvision's RandomResizedCrop: first fit of ten tries, else the central crop that fits."""
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(_CROP_TRIES):
            area = width * height * _between(self.scale[0], self.scale[1], draws[2 * attempt])
            aspect = math.exp(_between(log_ratio[0], log_ratio[1], draws[2 * attempt + 1]))
            crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left = int(draws[_CROP_DRAWS - 2] * (width - crop_width + 1))
                top = int(draws[_CROP_DRAWS - 1] * (height - crop_height + 1))
                return left, top, left + crop_width, top + crop_height
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        crop_width = max(1, min(width, round(height * aspect)))
        crop_height = max(1, min(height, round(width / aspect)))
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


def _check(name: str, values: object, count: int, least: float = 0, largest: float = math.inf) -> None:
    numbers = values if isinstance(values, Sequence) else ()
    if len(numbers) != count or not all(isinstance(n, int | float) and least <= n <= largest for n in numbers):
        raise ConfigError(f"data.augmentation.{name}={values} is not {count} number(s) from {least:g} to {largest:g}")


def _color_matrix(saturation: float, hue: float) -> np.ndarray:
    """Scale colours away from the grey axis by `saturation` and turn them about it by `hue` turns."""
    gray = np.full((3, 3), 1 / 3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # the axis (1, 1, 1), as a cross product
    turn = math.cos(2 * math.pi * hue) * (np.eye(3) - gray) + math.sin(2 * math.pi * hue) * across
    return gray + saturation * turn


def resize_bicubic(pixels: Pixels, out: Pixels) -> None:
    """Antialiased resize of bytes, equal to Pillow's to one level, written where it is wanted."""
    if pixels.shape == out.shape:
        out[:] = pixels
        return
    source, target = (torch.from_numpy(array).permute(2, 0, 1)[None] for array in (pixels, out))  # views
    torch.ops.aten._upsample_bicubic2d_aa.out(source, list(out.shape[:2]), False, None, None, out=target)


def _aligned(box: Box, step: int, width: int, height: int) -> Box:
    """The box moved to multiples of `step`, or to the image's edge."""
    left, top, right, bottom = (step * round(edge / step) for edge in box)
    return left, top, min(right, width), min(bottom, height)


def _randaugment(pixels: Pixels, seed: float, num_ops: int, magnitude: int) -> np.ndarray:
    transform = v2.RandAugment(num_ops=num_ops, magnitude=magnitude)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_whole(seed))
        changed = transform(torch.from_numpy(pixels).permute(2, 0, 1))
    return changed.permute(1, 2, 0).numpy()


def _erase(pixels: Pixels, seed: float, count: int) -> None:
    """Fill rectangles with noise."""
    height, width = pixels.shape[:2]
    log_ratio = math.log(_ERASED_RATIO[0]), math.log(_ERASED_RATIO[1])
    for number, draws in enumerate(keyed_uniforms(_whole(seed), np.arange(count), count=4).tolist()):
        area = _between(*_ERASED_AREA, draws[0]) * height * width / count
        aspect = math.exp(_between(*log_ratio, draws[1]))
        rows = min(height, max(1, round(math.sqrt(area / aspect))))
        columns = min(width, max(1, round(math.sqrt(area * aspect))))
        top, left = int(draws[2] * (height - rows + 1)), int(draws[3] * (width - columns + 1))
        noise = keyed_bits(_whole(seed), number, 1, count=-(-rows * columns * 3 // 8)).view(np.uint8)
        pixels[top : top + rows, left : left + columns] = noise[: rows * columns * 3].reshape(rows, columns, 3)


def _whole(draw: float) -> int:
    return int(draw * 2**53)


def _between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * draw
