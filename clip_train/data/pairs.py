"""Random access to the image-caption pairs of a list of shards."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_train.data.captions import CaptionKey, UnusableCaption
from clip_train.data.index import ABSENT, ShardIndex
from clip_train.errors import DataError

_MAX_OPEN_FILES = 256
_PROBED_SAMPLES = 100


class Pair(NamedTuple):
    """One sample, still encoded. `captions` holds at least one text."""

    image: bytes
    captions: list[str]


class PairReader:
    """Reads (shard, sample) as an encoded image and its captions.

    A sample without the image or the caption file does not count as a sample; `num_incomplete` says how many there
    are. A whole shard without one of them is an error.

    Args:
        indexes: from `load_indexes`.
        image_key: extensions that hold the image, `;` between them; the first that a sample has is taken.
        caption_key: see `CaptionKey`.
        setting: where the two keys are in the config, for errors.

    Raises:
        DataError: a shard has no images or no captions under these keys.
    """

    def __init__(self, indexes: Sequence[ShardIndex], image_key: str, caption_key: str, setting: str = "data") -> None:
        self._indexes = list(indexes)
        self._setting = setting
        self._image_extensions = image_key.split(";")
        self._caption_key = CaptionKey.parse(caption_key)
        self._rows = [self._complete_rows(index) for index in self._indexes]
        self.counts = [
            index.num_samples if rows is None else len(rows) for index, rows in zip(self._indexes, self._rows)
        ]
        self.num_incomplete = sum(index.num_samples for index in self._indexes) - sum(self.counts)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._check_caption_path()

    def __len__(self) -> int:
        return sum(self.counts)

    def read(self, shard: int, sample: int) -> Pair:
        """Read one pair.

        Raises:
            UnusableCaption: it has no caption one could train on.
            OSError: the shard cannot be read any more.
        """
        row = self._row(shard, sample)
        captions = self._caption_key.read(self._content(shard, row, [self._caption_key.extension]))
        return Pair(self._content(shard, row, self._image_extensions), captions)

    def key(self, shard: int, sample: int) -> str:
        """The name of a sample, for people: shard and sample number in it."""
        return f"{self._indexes[shard].shard}[{self._row(shard, sample)}]"

    def _row(self, shard: int, sample: int) -> int:
        rows = self._rows[shard]
        return sample if rows is None else int(rows[sample])

    def _content(self, shard: int, row: int, extensions: Sequence[str]) -> bytes:
        index = self._indexes[shard]
        for extension in extensions:
            if extension in index.extensions:
                offset, size = index.extents[row, index.extensions.index(extension)]
                if offset != ABSENT:
                    return os.pread(self._file(shard), int(size), int(offset))
        raise DataError(f"{index.shard}[{row}] has no {' or '.join(extensions)}")

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self._indexes[shard].shard, os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": OrderedDict()}  # descriptors do not travel to another process

    def _complete_rows(self, index: ShardIndex) -> np.ndarray | None:
        """The samples with image and caption; None for all, known without reading the index."""
        images = [extension for extension in self._image_extensions if extension in index.extensions]
        caption = self._caption_key.extension
        found = f"found: {', '.join(index.extensions)}"
        if not images:
            wanted = ";".join(self._image_extensions)
            raise DataError(f"shard {index.shard} has no images under {self._setting}.image_key={wanted} ({found})")
        if caption not in index.extensions:
            raise DataError(
                f"shard {index.shard} has no captions under {self._setting}.caption_key={caption} ({found})"
            )
        count = dict(zip(index.extensions, index.files_per_extension))
        if count[caption] == index.num_samples and any(count[image] == index.num_samples for image in images):
            return None
        present = index.extents[:, :, 0] != ABSENT
        has_image = present[:, [index.extensions.index(image) for image in images]].any(axis=1)
        rows = np.flatnonzero(has_image & present[:, index.extensions.index(caption)])
        if len(rows) == 0:
            raise DataError(f"shard {index.shard} has no sample with both an image and a {caption} caption ({found})")
        return rows

    def _check_caption_path(self) -> None:
        """A wrong `json:` path is wrong everywhere: say so before the first step."""
        if not self._caption_key.path or not self._indexes:
            return
        reason: Exception | None = None
        for sample in range(min(_PROBED_SAMPLES, self.counts[0])):
            try:
                self.read(0, sample)
                return
            except UnusableCaption as error:
                reason = error
        name = Path(self._indexes[0].shard).name
        wanted = f"{self._caption_key.extension}:{'.'.join(self._caption_key.path)}"
        raise DataError(f"{self._setting}.caption_key={wanted}: the first samples of {name} have {reason}")
