"""Captions for pictures on disk."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from clip_train.data.decoding import UnusableImage
from clip_train.data.preprocessing import preprocess
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.errors import DataError
from clip_train.models.captioner import Captioner
from clip_train.models.generation import CaptionOptions, generate


def caption_pictures(
    model: Captioner,
    pictures: Sequence[Path],
    options: CaptionOptions,
    *,
    image_size: int,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    batch_size: int = 16,
) -> Iterator[tuple[Path, str]]:
    """Each picture's path with a caption, in their order.

    Args:
        model: in evaluation mode, on the device to compute on.
        pictures: files.
        options: how captions are chosen.
        image_size, resize_mode, interpolation: of the model.
        batch_size: pictures at once.

    Raises:
        DataError: a picture cannot be read.
        ConfigError: the captions are to be longer than the model's texts.
    """
    tokenizer = ClipTokenizer(model.text.context_length)
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        pixels = np.stack([read_picture(path, image_size, resize_mode, interpolation) for path in batch])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(model.logit_scale.device)
        for path, ids in zip(batch, generate(model, images, options).tolist(), strict=True):
            yield path, tokenizer.decode(ids)


def read_picture(path: Path, image_size: int, resize_mode: str, interpolation: str) -> np.ndarray:
    """A file's pixels as a model takes them. Raises DataError if it cannot be read."""
    try:
        return preprocess(path.read_bytes(), image_size, resize_mode, interpolation)
    except UnusableImage as error:
        raise DataError(f"{path}: {error}; leave it out") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; leave it out") from error
