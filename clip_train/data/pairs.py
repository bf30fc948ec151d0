"""Random access to the image-caption pairs of a list of shards."""

import os
import resource
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from clip_train.data.captions import CaptionSource, UnusableCaption
from clip_train.data.class_names import ClassNames
from clip_train.data.index import ABSENT, ShardIndex
from clip_train.data.retries import with_retries
from clip_train.errors import DataError

_OPEN_SHARDS = 256
_OTHER_DESCRIPTORS = 512  # what a process needs besides: a batch that is sent has two, and up to 16 are on the way
_MOST_OPEN = 30_000  # the index of each is a mapped file, and a process can map some 65,000
_PROBED_SAMPLES = 100
_RETRIES = 15  # of a read that fails: for some four minutes, in which a file server may come back
_WORTH_READING_OVER = 1 << 16  # bytes between two files of a sample that cost less than a second call


class UnusableSample(ValueError):
    """A sample without one of its files.

    Attributes:
        kind: `file_missing`.
    """

    kind = "file_missing"


class RemoteShard(Protocol):
    """A shard that is brought here when it is first read."""

    @property
    def shard(self) -> str:
        """Its address."""
        ...

    @property
    def count(self) -> int:
        """How many samples it has."""
        ...

    def open(self) -> tuple[int, ShardIndex]:
        """A descriptor of a local copy, which stays while it is open, and its index. Raises DataError."""
        ...


class Pair(NamedTuple):
    """One sample, still encoded, and what knows how to find a caption in its files."""

    image: bytes
    files: Mapping[str, bytes]
    captions: CaptionSource

    def caption(self, draw: float) -> str:
        """One of its captions, by a number in [0, 1). Raises UnusableCaption if it has none one could train on."""
        return self.captions.draw(self.files, draw)

    def first_caption(self) -> str:
        """The one evaluation takes. Raises UnusableCaption."""
        return self.captions.first(self.files)

    def all_captions(self) -> list[str]:
        """Those of retrieval with several per image. Raises UnusableCaption."""
        return self.captions.all(self.files)

    def label(self) -> int:
        """Its class, if the reader has class names. Raises UnusableCaption."""
        return self.captions.label(self.files)


class _Keys(NamedTuple):
    """Which files of a sample matter, and where in the config that is said."""

    images: list[str]
    captions: CaptionSource
    caption_key: str | Mapping[str, float] | None
    image_setting: str
    caption_setting: str


class _OpenShard(NamedTuple):
    descriptor: int
    extensions: tuple[str, ...]
    extents: np.ndarray
    rows: np.ndarray | None  # the complete samples; None for all


class PairReader:
    """Reads (shard, sample) as an encoded image and its captions.

    A sample without the image or any caption file does not count as a sample; `num_incomplete` says how many there
    are. A whole shard without one of them is an error.

    Args:
        shards: from `load_indexes`, or shards elsewhere.
        image_key: extensions that hold the image, `;` between them; the first that a sample has is taken.
        caption_key: see `CaptionSource`; None for pictures alone, whatever else there is.
        setting: where the two keys are in the config, for errors.
        classes: what the numbers in `cls` files stand for, for the caption key `cls`.
        caption_setting: the caption key's own name in the config; None if it stands beside the other.

    Raises:
        DataError: a shard has no images or no captions under these keys.
    """

    def __init__(
        self,
        shards: Sequence[ShardIndex | RemoteShard],
        image_key: str,
        caption_key: str | Mapping[str, float] | None,
        setting: str = "data",
        classes: ClassNames | None = None,
        caption_setting: str | None = None,
    ) -> None:
        captions = CaptionSource.none() if caption_key is None else CaptionSource.parse(caption_key, classes)
        settings = f"{setting}.image_key", caption_setting or f"{setting}.caption_key"
        keys = _Keys(image_key.split(";"), captions, caption_key, *settings)
        self._shards = list(shards)
        self._keys = [keys] * len(self._shards)
        self.counts = [_count(shard, keys) for shard in self._shards]
        local = [shard for shard in self._shards if isinstance(shard, ShardIndex)]
        self.num_incomplete = sum(s.num_samples for s in local) - sum(_count(s, keys) for s in local)
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._most_open = _OPEN_SHARDS
        self._needed: dict[tuple[int, int], dict[str, tuple[int, int]]] = {}
        if local:
            self._check_caption_path(keys)

    @classmethod
    def join(cls, readers: Sequence["PairReader"]) -> "PairReader":
        """One reader over the shards of all, in their order."""
        joined = cls.__new__(cls)
        joined._shards = [shard for reader in readers for shard in reader._shards]
        joined._keys = [keys for reader in readers for keys in reader._keys]
        joined.counts = [count for reader in readers for count in reader.counts]
        joined.num_incomplete = sum(reader.num_incomplete for reader in readers)
        joined._open_shards, joined._most_open, joined._needed = OrderedDict(), _OPEN_SHARDS, {}
        return joined

    def keep_open(self, num_shards: int) -> None:
        """Keep so many shards open, in this process and those that it starts, as far as the system allows.

        Fewer than are read in turn would mean to open one for each sample. More than that would hold copies of remote
        shards in a cache that needs the room.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = min(num_shards, _MOST_OPEN) + _OTHER_DESCRIPTORS
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        self._most_open = max(1, min(num_shards, allowed - _OTHER_DESCRIPTORS))

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def classes(self) -> list[ClassNames | None]:
        """What the labels stand for, of each source that differs in it; None for one without labels."""
        return list(dict.fromkeys(keys.captions.classes for keys in self._keys))

    def read(self, shard: int, sample: int) -> Pair:
        """Read one pair.

        Raises:
            UnusableSample: a shard elsewhere has fewer samples than it was said to have.
            DataError: the shard cannot be read any more.
        """
        keys = self._keys[shard]
        extents = self._needed.pop((shard, sample), None) or self._extents(shard, sample)
        contents = self._contents(shard, extents)
        image = next(extension for extension in keys.images if extension in contents)
        return Pair(contents.pop(image), contents, keys.captions)

    def will_need(self, samples: Iterable[tuple[int, int]]) -> None:
        """Tell the system that these (shard, sample) will be read next, so that it fetches them meanwhile."""
        self._needed.clear()
        for shard, sample in samples:
            try:
                extents = self._extents(shard, sample)
            except UnusableSample:
                continue  # reading it will say so
            self._needed[shard, sample] = extents
            for offset, size in extents.values():
                os.posix_fadvise(self._open(shard).descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def name(self, shard: int, sample: int) -> str:
        """Shard and number in it: `00000.tar[17]`, with the shard's whole path."""
        rows = self._open(shard).rows
        return f"{self._shards[shard].shard}[{sample if rows is None or sample >= len(rows) else int(rows[sample])}]"

    @property
    def shard_names(self) -> list[str]:
        """The path or address of each shard."""
        return [shard.shard for shard in self._shards]

    def key(self, shard: int, sample: int) -> str:
        """The sample's key: its files' name up to the first dot, as the header before a file has it."""
        try:
            offset, _ = next(iter(self._extents(shard, sample).values()))
        except UnusableSample:
            return ""
        header = self._pread(shard, 100, offset - 512)
        return header.split(b"\0", 1)[0].decode("utf-8", "replace").rpartition("/")[2].partition(".")[0]

    def _extents(self, shard: int, sample: int) -> dict[str, tuple[int, int]]:
        """(offset, size) of the image, under its extension, and of the caption files."""
        opened, keys = self._open(shard), self._keys[shard]
        complete = len(opened.extents) if opened.rows is None else len(opened.rows)
        if sample >= complete:
            raise UnusableSample(f"{self._shards[shard].shard} has {complete} samples, not {self.counts[shard]}")
        row = opened.extents[sample if opened.rows is None else opened.rows[sample]].tolist()
        present = {
            extension: (offset, size) for extension, (offset, size) in zip(opened.extensions, row) if offset != ABSENT
        }
        image = next(extension for extension in keys.images if extension in present)
        wanted = (image, *(extension for extension in keys.captions.extensions if extension in present))
        return {extension: present[extension] for extension in wanted}

    def _contents(self, shard: int, extents: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
        """The files' bytes, by one call if they lie close together, as those of a sample do."""
        start = min(offset for offset, _ in extents.values())
        length = max(offset + size for offset, size in extents.values()) - start
        if length > sum(size for _, size in extents.values()) + _WORTH_READING_OVER:
            return {extension: self._pread(shard, size, offset) for extension, (offset, size) in extents.items()}
        block = self._pread(shard, length, start)
        return {ext: block[offset - start : offset - start + size] for ext, (offset, size) in extents.items()}

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        name = self._shards[shard].shard

        def read() -> bytes:
            try:
                return os.pread(self._open(shard).descriptor, size, offset)
            except OSError:
                self._close(shard)  # a descriptor of before a server's failure may stay useless
                raise

        content = with_retries(read, f"shard {name} cannot be read any more", _RETRIES)
        if len(content) < size:
            raise DataError(f"shard {name} has become shorter since it was indexed: do not change shards in use")
        return content

    def _open(self, shard: int) -> _OpenShard:
        if shard not in self._open_shards:
            while len(self._open_shards) >= self._most_open:
                self._close(next(iter(self._open_shards)))
            self._open_shards[shard] = _opened(self._shards[shard], self._keys[shard])
        self._open_shards.move_to_end(shard)
        return self._open_shards[shard]

    def _close(self, shard: int) -> None:
        if opened := self._open_shards.pop(shard, None):
            os.close(opened.descriptor)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open_shards": OrderedDict()}  # descriptors do not travel to another process

    def _check_caption_path(self, keys: _Keys) -> None:
        """A wrong `json:` path is wrong everywhere: say so before the first step."""
        shard = next(number for number, shard in enumerate(self._shards) if isinstance(shard, ShardIndex))
        reason: Exception | None = None
        for sample in range(min(_PROBED_SAMPLES, self.counts[shard])):
            try:
                self.read(shard, sample).first_caption()
                return
            except UnusableCaption as error:
                if error.kind != "caption_missing":
                    return
                reason = error
        name = Path(self._shards[shard].shard).name
        raise DataError(f"{keys.caption_setting}={keys.caption_key}: the first samples of {name} have {reason}")


def _count(shard: ShardIndex | RemoteShard, keys: _Keys) -> int:
    if not isinstance(shard, ShardIndex):
        return shard.count
    rows = _complete_rows(shard, keys)
    return shard.num_samples if rows is None else len(rows)


def _opened(shard: ShardIndex | RemoteShard, keys: _Keys) -> _OpenShard:
    if isinstance(shard, ShardIndex):
        name = f"shard {shard.shard} cannot be read any more"
        descriptor, index = with_retries(lambda: os.open(shard.shard, os.O_RDONLY), name, _RETRIES), shard
    else:
        descriptor, index = shard.open()
    try:
        return _OpenShard(descriptor, index.extensions, index.read_extents(), _complete_rows(index, keys))
    except (DataError, OSError, ValueError) as error:
        os.close(descriptor)
        raise DataError(f"the index of shard {shard.shard} cannot be read any more: {error}") from error


def _complete_rows(index: ShardIndex, keys: _Keys) -> np.ndarray | None:
    """The samples with image and caption; None for all, known without reading the index.

    Raises:
        DataError: there are none.
    """
    images = [extension for extension in keys.images if extension in index.extensions]
    captions = [extension for extension in keys.captions.extensions if extension in index.extensions]
    found = f"found: {', '.join(index.extensions)}"
    if not images:
        wanted = ";".join(keys.images)
        raise DataError(f"shard {index.shard} has no images under {keys.image_setting}={wanted} ({found})")
    if not captions and keys.caption_key is not None:
        raise DataError(
            f"shard {index.shard} has no captions under {keys.caption_setting}={keys.caption_key} ({found})"
        )
    count = dict(zip(index.extensions, index.files_per_extension))
    needed = [images, captions] if captions else [images]
    if all(any(count[e] == index.num_samples for e in extensions) for extensions in needed):
        return None
    present = index.read_extents()[:, :, 0] != ABSENT
    has_each = [
        present[:, [index.extensions.index(extension) for extension in extensions]].any(axis=1) for extensions in needed
    ]
    rows = np.flatnonzero(np.logical_and.reduce(has_each))
    if len(rows) == 0:
        wanted = " or ".join(captions)
        lacking = f"both an image and a {wanted} caption" if captions else "an image"
        raise DataError(f"shard {index.shard} has no sample with {lacking} ({found})")
    return rows
