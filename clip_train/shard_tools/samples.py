"""All samples of the shards, or some drawn at random, as tasks for many processes; complete or not."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple

import numpy as np

from clip_train.data.captions import CaptionSource
from clip_train.data.index import ABSENT, ShardIndex
from clip_train.errors import ConfigError, DataError
from clip_train.shard_tools.access import ShardAccess

_SAMPLES_PER_TASK = 250


class StoredSample(NamedTuple):
    """A sample's files as they are, without those it lacks. `image` is the first of the extensions that it has.

    Attributes:
        captions: files by extension, those that were asked for besides among them.
        image_offset: byte where the picture begins in the shard; -1 if there is none.
    """

    shard: str
    key: str
    image: bytes | None
    image_extension: str
    captions: Mapping[str, bytes]
    image_offset: int


@dataclass(frozen=True)
class Selection:
    """Which samples, and which of their files.

    Attributes:
        image_key, caption_key: as in the `data` group of the configs.
        num_samples: as many, drawn at random without repetition; None is all.
        seed: decides which.

    Raises:
        ConfigError: a value cannot be used.
    """

    image_key: str
    caption_key: Any
    num_samples: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ConfigError(f"num_samples={self.num_samples} is neither a whole number of at least 1 nor null")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} is negative")
        CaptionSource.parse(self.caption_key)

    @property
    def image_extensions(self) -> list[str]:
        """The first that a sample has is taken."""
        return self.image_key.split(";")

    @property
    def captions(self) -> CaptionSource:
        """How captions are found in a sample's files."""
        return CaptionSource.parse(self.caption_key)


@dataclass(frozen=True)
class SampleTask:
    """Some samples of one shard, by ascending number in it; `extras` are extensions of files to read besides."""

    index: ShardIndex
    rows: Sequence[int]
    selection: Selection
    access: ShardAccess
    extras: tuple[str, ...] = ()

    def read(self) -> Iterator[StoredSample]:
        """Read the samples in the order of the shard."""
        image_extensions = self.selection.image_extensions
        others = dict.fromkeys((*self.selection.captions.extensions, *self.extras))
        extents = self.index.read_extents()
        with self.access.local(self.index.shard) as path, open(path, "rb", buffering=0) as file:
            descriptor = file.fileno()
            for row in self.rows:
                offsets, sizes = (dict(zip(self.index.extensions, column)) for column in extents[row].T.tolist())
                there = [extension for extension, offset in offsets.items() if offset != ABSENT]
                image = next((extension for extension in image_extensions if extension in there), "")
                wanted = [extension for extension in (image, *others) if extension in there]
                files = {name: os.pread(descriptor, sizes[name], offsets[name]) for name in wanted}
                key = sample_key(descriptor, min(offsets[extension] for extension in there))
                place = offsets.get(image, ABSENT)
                yield StoredSample(self.index.shard, key, files.pop(image, None), image, files, place)


def sample_tasks(indexes: Sequence[ShardIndex], selection: Selection, access: ShardAccess) -> list[SampleTask]:
    """Tasks that together read the selected samples.

    Raises:
        DataError: no shard has any file under one of the keys.
    """
    check_key(indexes, "image_key", selection.image_key, selection.image_extensions)
    check_key(indexes, "caption_key", selection.caption_key, selection.captions.extensions)
    counts = [index.num_samples for index in indexes]
    ends = np.cumsum(counts, dtype=np.int64)
    total = sum(counts)
    if selection.num_samples is None or selection.num_samples >= total:
        drawn = np.arange(total)
    else:
        generator = np.random.Generator(np.random.PCG64(selection.seed))
        drawn = np.sort(generator.choice(total, selection.num_samples, replace=False))
    tasks = []
    for index, count, end in zip(indexes, counts, ends.tolist()):
        first, last = np.searchsorted(drawn, [end - count, end])
        rows = (drawn[first:last] - (end - count)).tolist()
        tasks += [
            SampleTask(index, rows[start : start + _SAMPLES_PER_TASK], selection, access)
            for start in range(0, len(rows), _SAMPLES_PER_TASK)
        ]
    return tasks


def check_key(indexes: Sequence[ShardIndex], setting: str, value: object, extensions: Sequence[str]) -> None:
    """Raises DataError if none of the shards has a file with one of these extensions."""
    found = sorted({extension for index in indexes for extension in index.extensions})
    if indexes and not set(extensions) & set(found):
        raise DataError(f"{setting}={value}: no shard has such files (found: {', '.join(found)})")


def sample_key(descriptor: int, offset: int) -> str:
    """A sample's name: that in the header before one of its files, up to the first dot."""
    header = os.pread(descriptor, 100, offset - BLOCKSIZE)
    folder, slash, file = header.split(b"\0", 1)[0].decode("utf-8", "replace").rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"
