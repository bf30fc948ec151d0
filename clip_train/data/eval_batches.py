"""Batches of a validation set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset

from clip_train.data.batches import UNUSABLE, BadSample, Batch, assemble, failed, pixel_buffer
from clip_train.data.captions import UnusableCaption
from clip_train.data.class_names import ClassNames
from clip_train.data.decoding import MAX_IMAGE_PIXELS, Pixels, UnusableImage
from clip_train.data.pairs import Pair, UnusableSample
from clip_train.data.preprocessing import preprocess
from clip_train.data.tokenizer_choice import CaptionTokenizer
from clip_train.errors import DataError


class SampleReader(Protocol):
    """What evaluation asks of a set of samples: a `PairReader`, or pictures that are files of their own.

    Attributes:
        counts: samples per shard.
    """

    counts: list[int]

    def __len__(self) -> int: ...

    @property
    def shard_names(self) -> list[str]: ...

    @property
    def classes(self) -> list[ClassNames | None]: ...

    def read(self, shard: int, sample: int) -> Pair: ...

    def name(self, shard: int, sample: int) -> str: ...

    def key(self, shard: int, sample: int) -> str: ...


@dataclass(frozen=True)
class EvalBatches(Dataset[Batch]):
    """Slices of a validation set: fixed crop, first caption. A sample that cannot be used is an error.

    Attributes:
        with_labels: whether batches tell their samples' classes.
        keep_bad: a sample that cannot be used is no error: its label is -1, and `bad` tells of it.
        change: what else is done to the pixels; None for nothing.
        with_captions: whether batches tell all captions of their samples.
    """

    reader: SampleReader
    tokenizer: CaptionTokenizer
    image_size: int
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    max_image_pixels: int = MAX_IMAGE_PIXELS
    with_labels: bool = False
    keep_bad: bool = False
    change: Callable[[Pixels], Pixels] | None = None
    with_captions: bool = False

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        pixels, captions, labels, bad = pixel_buffer(len(indices), self.image_size), [], [], []
        all_captions = []
        try:
            for index, out in zip(indices, pixels.numpy()):
                try:
                    pair = self.reader.read(*self._locate(index))
                    out[:], caption = self._picture(pair), pair.first_caption()
                    label = pair.label() if self.with_labels else -1
                    all_captions.append(pair.all_captions() if self.with_captions else [])
                except UNUSABLE as error:
                    if not self.keep_bad:
                        return failed(f"validation sample {self.name(index)} cannot be used: {error}")
                    bad.append(self._bad(index, error))
                    out[:], caption, label = 0, "", -1
                captions.append(caption)
                labels.append(label)
        except DataError as error:
            return failed(str(error))
        batch = assemble(pixels, self.tokenizer(captions), bad, labels=labels if self.with_labels else None)
        if self.with_captions:
            batch["captions"] = all_captions
        return batch

    def _bad(self, index: int, error: UnusableImage | UnusableCaption | UnusableSample) -> BadSample:
        shard, sample = self._locate(index)
        return BadSample(error.kind, self.reader.shard_names[shard], self.reader.key(shard, sample), str(error))

    def name(self, index: int) -> str:
        """What a sample is called in errors: its shard and place, or its file."""
        return self.reader.name(*self._locate(index))

    def key(self, index: int) -> str:
        """The name of a sample's files."""
        return self.reader.key(*self._locate(index))

    def picture_and_caption(self, index: int) -> tuple[Pixels, str]:
        """One sample. Raises UnusableImage, UnusableCaption, UnusableSample or DataError."""
        pair = self.reader.read(*self._locate(index))
        return self._picture(pair), pair.first_caption()

    def _picture(self, pair: Pair) -> Pixels:
        pixels = preprocess(pair.image, self.image_size, self.resize_mode, self.interpolation, self.max_image_pixels)
        return self.change(pixels) if self.change else pixels

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self.reader.counts[shard])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.reader.counts)


def rank_slices(num_samples: int, rank: int, world_size: int, max_batch: int) -> list[range]:
    """This rank's contiguous part of a set, in as many slices of at most `max_batch` as every other rank has."""
    first, last = num_samples * rank // world_size, num_samples * (rank + 1) // world_size
    largest_part = -(-num_samples // world_size)
    num_slices = -(-largest_part // max_batch)
    edges = [first + (last - first) * i // num_slices for i in range(num_slices + 1)]
    return [range(a, b) for a, b in pairwise(edges)]
