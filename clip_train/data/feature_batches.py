"""Batches of features that were computed before, in the order in which pictures would have come."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from clip_train.data.batches import MAX_CONSECUTIVE_BAD, BadSample, Batch, TrainBatches, failed
from clip_train.data.files import whole_file, write_atomic
from clip_train.errors import DataError

_LEAST_CHUNK, _MOST_CHUNKS = 256, 256


@dataclass(frozen=True)
class FeatureTable:
    """Features and labels of all samples of a set, in its own order.

    Attributes:
        chunks: features by `chunk_parts`, mapped files.
        labels: -1 for a sample that cannot be used.
        bad: of each of those, what is wrong.
    """

    chunks: Sequence[np.ndarray]
    labels: np.ndarray
    bad: Mapping[int, BadSample]

    @classmethod
    def open(cls, folder: Path, num_samples: int) -> "FeatureTable":
        """Raises DataError if the files are not all there and whole."""
        chunks, labels, bad = [], [], {}
        for number, part in enumerate(chunk_parts(num_samples)):
            values, about = chunk_paths(folder, number)
            try:
                content: dict[str, Any] = json.loads(about.read_bytes())
                chunks.append(np.load(values, mmap_mode="r"))
            except (OSError, ValueError) as error:
                raise DataError(f"features {values} cannot be read ({error}): remove {folder}") from error
            labels += content["labels"]
            bad |= {part.start + int(row): BadSample(*sample) for row, sample in content["bad"].items()}
        if len(labels) != num_samples:
            raise DataError(f"features in {folder} are of {len(labels)} samples, not {num_samples}: remove it")
        return cls(chunks, np.array(labels, dtype=np.int64), bad)

    def rows(self, indices: Sequence[int]) -> np.ndarray:
        """The features of some samples."""
        size = len(self.chunks[0])
        return np.stack([self.chunks[index // size][index % size] for index in indices])


def chunk_parts(num_samples: int) -> list[range]:
    """The samples in each of the files, whatever the number of ranks."""
    size = max(_LEAST_CHUNK, -(-num_samples // _MOST_CHUNKS))
    return [range(start, min(start + size, num_samples)) for start in range(0, num_samples, size)]


def chunk_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """A chunk's features, and its labels; the second is there when both are whole."""
    return folder / f"{number:05d}.npy", folder / f"{number:05d}.json"


def write_chunk(
    folder: Path, number: int, features: np.ndarray, labels: Sequence[int], bad: Sequence[BadSample]
) -> None:
    """Write the features of a chunk, whole or not at all.

    Args:
        bad: of each label that is -1, in their order, what is wrong.
    """
    values, about = chunk_paths(folder, number)
    with whole_file(values) as file:
        np.save(file, features)
    rows = [row for row, label in enumerate(labels) if label < 0]
    content = {"labels": list(labels), "bad": dict(zip(rows, bad, strict=True))}
    write_atomic(about, json.dumps(content).encode())


@dataclass(frozen=True)
class FeatureBatches(Dataset[Batch]):
    """The local batch that begins at a position, as `TrainBatches` has it, of features for pictures."""

    table: FeatureTable
    pictures: TrainBatches

    def __getitem__(self, start: int) -> Batch:
        """The part of this rank of the global batch `[start, start + batch_size)`."""
        like = self.pictures
        positions = like.order.rank_positions(start, like.batch_size, like.rank, like.world_size)
        shards, samples = (numbers.tolist() for numbers in like.order.locate(positions))
        bad: list[BadSample] = []
        try:
            used = [self._usable(shard, sample, bad) for shard, sample in zip(shards, samples)]
        except DataError as error:
            return failed(str(error), bad)
        indices = [self._firsts[shard] + sample for shard, sample in zip(shards, used)]
        names = [like.reader.name(*sample) for sample in zip(shards, used)] if like.with_names else []
        nothing = torch.empty(len(indices), 0)
        return Batch(
            image=nothing,
            text=nothing,
            features=torch.from_numpy(self.table.rows(indices)),
            label=torch.from_numpy(self.table.labels[indices]),
            bad=bad,
            error="",
            names=names,
            seconds={},
            retries=0,
        )

    def _usable(self, shard: int, sample: int, bad: list[BadSample]) -> int:
        """The sample, or the next usable one in its shard; then it goes to `bad`."""
        count, first = self.pictures.reader.counts[shard], self._firsts[shard]
        for step in range(min(count, MAX_CONSECUTIVE_BAD)):
            number = (sample + step) % count
            if self.table.labels[first + number] >= 0:
                return number
            if step == 0:
                bad.append(self.table.bad[first + number])
        name, tried = self.pictures.reader.name(shard, sample), min(count, MAX_CONSECUTIVE_BAD)
        raise DataError(f"{tried} unusable samples in a row, from {name} on ({self.table.bad[first + sample].reason})")

    @cached_property
    def _firsts(self) -> list[int]:
        """The number, in the whole set, of each shard's first sample."""
        return list(accumulate(self.pictures.reader.counts, initial=0))
