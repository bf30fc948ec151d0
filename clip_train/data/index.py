"""The index of a shard: for each sample, where the bytes of each of its files lie.

Built once by a header scan, kept beside the shard (`00000.tar.index`) or in `cache_dir`, in the safetensors layout,
memory-mapped when read, and rebuilt when the tar's size or time changed.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from safetensors.numpy import save

from clip_train.data.files import write_atomic
from clip_train.data.tar_scan import scan_tar
from clip_train.errors import DataError

_FORMAT = "1"
ABSENT = -1


@dataclass(frozen=True)
class ShardIndex:
    """Where the files of one shard's samples lie.

    `read_extents()[i, j]` is the (offset, size) of sample i's file with extension `extensions[j]`; an offset of
    `ABSENT` means that the sample has none. `files_per_extension[j]` counts the samples that have one. `num_bytes` is
    the size of the tar.
    """

    shard: str
    extensions: tuple[str, ...]
    files_per_extension: tuple[int, ...]
    num_samples: int
    num_bytes: int
    _source: "np.ndarray | tuple[str, int]"

    @property
    def is_kept(self) -> bool:
        """Whether it lies in a file, for the next process."""
        return not isinstance(self._source, np.ndarray)

    def read_extents(self) -> Int64[np.ndarray, "samples extensions 2"]:
        """The extents, mapped into memory; not kept, as a process can map some 65,000 files."""
        if isinstance(self._source, np.ndarray):
            return self._source
        path, offset = self._source
        shape = (self.num_samples, len(self.extensions), 2)
        return np.asarray(np.memmap(path, dtype=np.int64, mode="r", offset=offset, shape=shape))


def load_indexes(
    shards: Sequence[str], cache_dir: str | None = None, rank: int = 0, world_size: int = 1
) -> list[ShardIndex]:
    """The indexes of all shards; those not yet built are built, in parallel.

    Every rank calls this. Each begins at another shard, so ranks that share a file system scan different shards first
    and find the others' work when they come to it.
    """
    first = len(shards) * rank // world_size
    rotated = [*shards[first:], *shards[:first]]
    with ThreadPoolExecutor(min(16, len(shards) or 1)) as pool:
        indexes = list(pool.map(lambda shard: load_index(shard, cache_dir), rotated))
    return indexes[len(shards) - first :] + indexes[: len(shards) - first]


def load_index(shard: str, cache_dir: str | None = None) -> ShardIndex:
    """The index of one shard, from its cache or by a scan.

    Raises:
        DataError: the shard cannot be read, is no tar, is damaged, or holds no samples.
    """
    try:
        status = os.stat(shard)
    except OSError as error:
        raise DataError(f"cannot read shard {shard}: {error.strerror}") from error
    stamp = {"format": _FORMAT, "tar_size": str(status.st_size), "tar_time_ns": str(status.st_mtime_ns)}
    path = _cache_path(shard, cache_dir)
    return _read(path, shard, stamp) or _build(path, shard, stamp)


def cached_count(shard: str, cache_dir: str) -> int | None:
    """The number of samples by the index that was cached for `shard`, even if the shard is no longer there."""
    index = _read(_cache_path(shard, cache_dir), shard, {"format": _FORMAT})
    return index.num_samples if index else None


def _cache_path(shard: str, cache_dir: str | None) -> Path:
    if cache_dir is None:
        return Path(f"{shard}.index")
    absolute = os.path.abspath(shard)
    return Path(cache_dir) / f"{Path(shard).stem}-{hashlib.sha256(absolute.encode()).hexdigest()[:16]}.index"


def _read(path: Path, shard: str, stamp: dict[str, str]) -> ShardIndex | None:
    try:
        with open(path, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_size, 1 << 20)))
        metadata, tensor = header["__metadata__"], header["extents"]
        if any(metadata.get(key) != value for key, value in stamp.items()):
            return None
        data_start = 8 + header_size
        if os.path.getsize(path) != data_start + tensor["data_offsets"][1]:
            return None
    except (OSError, ValueError, KeyError):
        return None
    return ShardIndex(
        shard,
        tuple(json.loads(metadata["extensions"])),
        tuple(json.loads(metadata["files_per_extension"])),
        num_samples=tensor["shape"][0],
        num_bytes=int(metadata["tar_size"]),
        _source=(str(path), data_start),
    )


def _build(path: Path, shard: str, stamp: dict[str, str]) -> ShardIndex:
    extensions, extents = _scan_samples(shard)
    counts = tuple(int(n) for n in (extents[:, :, 0] != ABSENT).sum(axis=0))
    metadata = {**stamp, "extensions": json.dumps(extensions), "files_per_extension": json.dumps(counts)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({"extents": extents}, metadata))
    except OSError:
        pass  # a read-only folder: this process keeps the index in memory, the next one scans again
    in_memory = ShardIndex(shard, extensions, counts, len(extents), int(stamp["tar_size"]), _source=extents)
    return _read(path, shard, stamp) or in_memory


def _scan_samples(shard: str) -> tuple[tuple[str, ...], Int64[np.ndarray, "samples extensions 2"]]:
    """Group a tar's files into samples: consecutive files that share the name up to the first dot."""
    samples: list[dict[str, tuple[int, int]]] = []
    last_key = None
    for member in scan_tar(shard):
        folder, _, file = member.name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if not stem or not dot:
            continue
        key, extension = (folder, stem), extension.lower()
        if key != last_key:
            samples.append({})
            last_key = key
        if extension in samples[-1]:
            raise DataError(f"shard {shard} holds {member.name} twice: two samples share a key")
        samples[-1][extension] = (member.offset, member.size)
    if not samples:
        raise DataError(f"shard {shard} holds no samples (files named KEY.EXTENSION)")
    extensions = tuple(sorted({extension for sample in samples for extension in sample}))
    extents = np.full((len(samples), len(extensions), 2), ABSENT, dtype=np.int64)
    for row, sample in enumerate(samples):
        for column, extension in enumerate(extensions):
            if extension in sample:
                extents[row, column] = sample[extension]
    return extensions, extents
