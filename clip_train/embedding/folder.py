"""A folder of embeddings, read: those of clip-embed, and others in clip-retrieval's layout."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from clip_train.embedding.manifest import Manifest
from clip_train.embedding.options import MODALITIES
from clip_train.embedding.part_files import check_pyarrow, embedding_path, metadata_path
from clip_train.errors import DataError, first_line

_ROWS_AT_ONCE = 65_536
_FILES_KEPT = 256  # mapped embeddings of each side, and row groups of metadata


@dataclass(frozen=True)
class EmbeddingFolder:
    """Samples by number, in the order of the parts.

    Attributes:
        manifest: what clip-embed says of it; None for a folder of another program.
        embeddings: the files of each side that there is, `image` and `text`.
        metadata: the files with the same rows.
        counts: rows of each part.
    """

    path: Path
    manifest: Manifest | None
    embeddings: Mapping[str, Sequence[Path]]
    metadata: Sequence[Path]
    counts: Sequence[int]

    @classmethod
    def open(cls, path: str | Path) -> "EmbeddingFolder":
        """Raises DataError if there are none, they are not complete, or parts do not fit together."""
        path = Path(path).expanduser()
        manifest = Manifest.read(path)
        found = {side: _numbered(embedding_path(path, side, 0)) for side in MODALITIES}
        embeddings = {side: files for side, files in found.items() if files}
        metadata = _numbered(metadata_path(path, 0))
        if not embeddings:
            raise DataError(f"embeddings={path} holds none (img_emb/*.npy, text_emb/*.npy): write them by clip-embed")
        parts = {tuple(_number(file) for file in files) for files in (*embeddings.values(), metadata)}
        if len(parts) > 1 or (manifest and len(metadata) != len(manifest.parts)):
            remedy = "start clip-embed again" if manifest else "each .npy needs a metadata/*.parquet of its number"
            raise DataError(f"embeddings={path} is not complete: {remedy}")
        check_pyarrow()
        counts = {tuple(len(_mapped(file)) for file in files) for files in embeddings.values()}
        if counts != {tuple(_num_rows(file) for file in metadata)}:
            raise DataError(f"embeddings={path}: its images, texts and metadata are not of the same samples")
        return cls(path, manifest, embeddings, metadata, counts.pop())

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def ends(self) -> np.ndarray:
        """One past the last sample of each part."""
        return np.cumsum(self.counts)

    def width(self, side: str) -> int:
        """Of an embedding."""
        return _mapped(self.embeddings[side][0]).shape[1]

    def blocks(self, side: str) -> Iterator[Float[np.ndarray, "rows width"]]:
        """All embeddings of a side as fp32 unit vectors, in their order, some ten thousand at a time."""
        for path in self.embeddings[side]:
            part = _mapped(path)
            for start in range(0, len(part), _ROWS_AT_ONCE):
                yield _unit(np.asarray(part[start : start + _ROWS_AT_ONCE], dtype=np.float32))

    def vectors(self, side: str, numbers: np.ndarray) -> Float[np.ndarray, "rows width"]:
        """Some of a side as fp32 unit vectors."""
        found = np.empty((len(numbers), self.width(side)), dtype=np.float32)
        parts, rows = self._located(numbers)
        for part in np.unique(parts):
            of_part = parts == part
            found[of_part] = _mapped(self.embeddings[side][part])[rows[of_part]]
        return _unit(found)

    def rows(self, numbers: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """The metadata of some samples."""
        parts, rows = self._located(np.asarray(numbers, dtype=np.int64))
        return [_row(self.metadata[part], row) for part, row in zip(parts, rows.tolist())]

    def _located(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = np.searchsorted(self.ends, numbers, side="right")
        return parts, numbers - (self.ends[parts] - np.asarray(self.counts)[parts])


def _numbered(like: Path) -> list[Path]:
    """The files of the same kind, by the number in their names, however many digits it has."""
    return sorted(like.parent.glob(f"*{like.suffix}"), key=lambda file: (_number(file), file.name))


def _number(file: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", file.stem))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _mapped(path: Path) -> np.ndarray:
    try:
        values = _map(path, _version(path))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if values.ndim != 2:
        raise DataError(f"{path} is no table of embeddings: its shape is {values.shape}")
    return values


def _row(path: Path, row: int) -> dict[str, Any]:
    """Of a file of metadata; no more is read than its row group."""
    with _readable(path):
        version = _version(path)
        ends = _group_ends(path, version)
        group = int(np.searchsorted(ends, row, side="right"))
        start = int(ends[group - 1]) if group else 0
        return _read_group(path, version, group).slice(row - start, 1).to_pylist()[0]


def _num_rows(path: Path) -> int:
    from pyarrow import parquet

    with _readable(path):
        return parquet.read_metadata(path).num_rows


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def _version(path: Path) -> tuple[int, int]:
    """Differs when the file has been written anew."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(_FILES_KEPT)
def _map(path: Path, version: tuple[int, int]) -> np.ndarray:
    return np.load(path, mmap_mode="r")


@lru_cache(_FILES_KEPT)
def _group_ends(path: Path, version: tuple[int, int]) -> np.ndarray:
    """One past the last row of each row group."""
    from pyarrow import parquet

    about = parquet.read_metadata(path)
    return np.cumsum([about.row_group(group).num_rows for group in range(about.num_row_groups)])


@lru_cache(_FILES_KEPT)
def _read_group(path: Path, version: tuple[int, int], group: int) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group)
