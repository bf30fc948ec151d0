"""Batches as pure functions of where they start, so that workers, resuming and world size cannot change them."""

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clip_train.data.captions import UnusableCaption
from clip_train.data.images import Augmentation, resize_center_crop
from clip_train.data.keyed_random import AUGMENTATION, CAPTION_CHOICE, keyed_uniforms
from clip_train.data.order import SampleOrder
from clip_train.data.pairs import PairReader
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.errors import DataError

_MAX_CONSECUTIVE_BAD = 100


class Batch(TypedDict):
    """A rank's part of one global batch.

    `bad` names the samples that could not be used and were replaced; `error`, if not empty, says why none could be.
    It travels as data, because an exception in a loader's worker reaches one rank only and would leave the others
    waiting.
    """

    image: UInt8[Tensor, "b 3 height width"]
    text: Int64[Tensor, "b context"]
    bad: list[str]
    error: str


@dataclass(frozen=True)
class TrainBatches(Dataset[Batch]):
    """The local batch that begins at a position of the stream, for one rank."""

    reader: PairReader
    order: SampleOrder
    augmentation: Augmentation
    tokenizer: ClipTokenizer
    image_size: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __getitem__(self, start: int) -> Batch:
        """The part of this rank of the global batch `[start, start + batch_size)`."""
        positions = self.order.rank_positions(start, self.batch_size, self.rank, self.world_size)
        shards, samples = self.order.locate(positions)
        seed = self.order.seed
        draws = keyed_uniforms(AUGMENTATION, seed, positions, count=self.augmentation.num_draws).tolist()
        choices = keyed_uniforms(CAPTION_CHOICE, seed, positions, count=1)[:, 0].tolist()
        pixels = np.empty((len(positions), self.image_size, self.image_size, 3), dtype=np.uint8)
        captions, bad = [], []
        try:
            for i in range(len(positions)):
                pixels[i], caption = self._usable(int(shards[i]), int(samples[i]), draws[i], choices[i], bad)
                captions.append(caption)
        except DataError as error:
            return Batch(image=torch.empty(0), text=torch.empty(0), bad=bad, error=str(error))
        return _batch(pixels, self.tokenizer(captions), bad)

    def _usable(
        self, shard: int, sample: int, draws: list[float], choice: float, bad: list[str]
    ) -> tuple[np.ndarray, str]:
        """The sample, or the next usable one in its shard; the others' names go to `bad`."""
        count = self.reader.counts[shard]
        reason: Exception | None = None
        for step in range(min(count, _MAX_CONSECUTIVE_BAD)):
            neighbour = (sample + step) % count
            try:
                encoded, captions = self.reader.read(shard, neighbour)
                pixels = self.augmentation(encoded, self.image_size, draws)
                return pixels, captions[int(choice * len(captions))]
            except (OSError, UnusableCaption) as error:
                reason = error
                if step == 0:
                    bad.append(self.reader.key(shard, sample))
        first, tried = self.reader.key(shard, sample), min(count, _MAX_CONSECUTIVE_BAD)
        raise DataError(f"{tried} unusable samples in a row, from {first} on ({reason})")


@dataclass(frozen=True)
class EvalBatches(Dataset[Batch]):
    """Slices of a validation set: fixed crop, first caption. A sample that cannot be used is an error."""

    reader: PairReader
    tokenizer: ClipTokenizer
    image_size: int

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, indices: range) -> Batch:
        pixels = np.empty((len(indices), self.image_size, self.image_size, 3), dtype=np.uint8)
        captions = []
        try:
            for i, index in enumerate(indices):
                encoded, text = self._read(index)
                pixels[i] = resize_center_crop(encoded, self.image_size)
                captions.append(text[0])
        except (OSError, UnusableCaption) as error:
            name = self.reader.key(*self._locate(indices[len(captions)]))
            message = f"validation sample {name} cannot be used: {error}"
            return Batch(image=torch.empty(0), text=torch.empty(0), bad=[name], error=message)
        return _batch(pixels, self.tokenizer(captions), [])

    def picture_and_caption(self, index: int) -> tuple[np.ndarray, str]:
        """One sample for people to look at."""
        encoded, captions = self._read(index)
        return resize_center_crop(encoded, self.image_size), captions[0]

    def _read(self, index: int):
        return self.reader.read(*self._locate(index))

    def _locate(self, index: int) -> tuple[int, int]:
        ends = np.cumsum(self.reader.counts)
        shard = int(np.searchsorted(ends, index, side="right"))
        return shard, index - int(ends[shard] - self.reader.counts[shard])


def rank_slices(num_samples: int, rank: int, world_size: int, max_batch: int) -> list[range]:
    """This rank's contiguous part of a set, in as many slices of at most `max_batch` as every other rank has."""
    first, last = num_samples * rank // world_size, num_samples * (rank + 1) // world_size
    largest_part = -(-num_samples // world_size)
    num_slices = -(-largest_part // max_batch)
    edges = [first + (last - first) * i // num_slices for i in range(num_slices + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


class BatchStarts(Sampler[int]):
    """Where the batches of a run begin, from `samples_seen` on. Endless, so that the trainer alone decides the end."""

    def __init__(self, samples_seen: int, batch_size: int) -> None:
        self.samples_seen, self.batch_size = samples_seen, batch_size

    def __iter__(self) -> Iterator[int]:
        start = self.samples_seen
        while True:
            yield start
            start += self.batch_size


def make_loader(batches: Dataset[Batch], keys: Iterable, num_workers: int, pin_memory: bool = False) -> DataLoader:
    """Load `batches[key]` for each key, in order, whatever the number of workers."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker,
    )


def _batch(pixels: UInt8[np.ndarray, "b height width 3"], ids: Int64[np.ndarray, "b context"], bad: list[str]) -> Batch:
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # a view: channels last, as the files have it
    return Batch(image=image, text=torch.from_numpy(ids), bad=bad, error="")


def _as_is(batch: Any) -> Any:
    return batch


def _init_worker(_: int) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # schedulers signal every process; the trainer ends its workers itself
