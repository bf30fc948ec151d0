"""A FAISS index over a folder's embeddings, kept in it: `image.index` and `text.index`."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_train.data.files import whole_file, write_atomic
from clip_train.embedding.folder import EmbeddingFolder
from clip_train.errors import ConfigError, DataError

KINDS = ("flat", "hnsw", "ivf_pq")
_FLAT_BELOW, _HNSW_BELOW = 50_000, 1_000_000
_HNSW_LINKS, _HNSW_EF_CONSTRUCTION = 32, 80
_PER_LIST = 40  # samples per list that the lists are learned from
_PROBED = 4  # times the root of the number of lists are looked through: at a million, 128 of 1024
_LARGEST_CODE = 64  # bytes
_LEAST_LEARNED = 20_000


@dataclass(frozen=True)
class IndexOptions:
    """How to build.

    Attributes:
        kind: `flat` (exact), `hnsw`, `ivf_pq`, or `auto`, by size.
        seed: of the sample that ivf_pq learns from.

    Raises:
        ConfigError: no such kind.
    """

    kind: str
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, "auto"):
            raise ConfigError(f"kind={self.kind} is none of auto, {', '.join(KINDS)}")


@dataclass(frozen=True)
class IndexAbout:
    """What an index is.

    Attributes:
        count: of embeddings.
        embeddings: differs when they are others.
    """

    kind: str
    count: int
    embeddings: str


def index_path(folder: Path, side: str) -> Path:
    """Where the index of a side is."""
    return folder / f"{side}.index"


def build_index(folder: EmbeddingFolder, side: str, options: IndexOptions) -> IndexAbout:
    """Build the index of a side and write it, whole or not at all.

    Raises:
        DataError: it cannot be written, there is nothing to index, or what there is has changed meanwhile.
        ConfigError: there are too few embeddings for the kind.
    """
    faiss = import_faiss()
    if not len(folder):
        raise DataError(f"embeddings={folder.path} has no samples")
    kind, before = choose_kind(len(folder)) if options.kind == "auto" else options.kind, _digest(folder, side)
    index = make_index(kind, folder.width(side), len(folder))
    if not index.is_trained:
        index.train(_training_sample(folder, side, _num_learned(len(folder)), options.seed))
    for block in folder.blocks(side):
        index.add(block)
    if _digest(folder, side) != before:
        raise DataError(f"embeddings={folder.path} have changed while they were indexed: start again")
    path, about = index_path(folder.path, side), IndexAbout(kind, len(folder), before)
    try:
        _about_path(path).unlink(missing_ok=True)  # else it would speak for another index
        with whole_file(path) as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
        write_atomic(_about_path(path), json.dumps(asdict(about)).encode())
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    return about


def read_index(folder: EmbeddingFolder, side: str) -> tuple[Any, IndexAbout]:
    """The index of a side, mapped into memory.

    Raises:
        DataError: there is none, or it is of other embeddings.
    """
    faiss, path = import_faiss(), index_path(folder.path, side)
    build = f"build it by clip-search index embeddings={folder.path}"
    try:
        about = IndexAbout(**json.loads(_about_path(path).read_bytes()))
        flag = faiss.IO_FLAG_MMAP if about.kind == "ivf_pq" else faiss.IO_FLAG_MMAP_IFC
        index = faiss.read_index(str(path), flag)
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # RuntimeError is FAISS's
        raise DataError(f"embeddings={folder.path} has no whole index of its {side}s: {build}") from error
    if about.embeddings != _digest(folder, side):
        raise DataError(f"{path} is of other embeddings than there are now: {build}")
    return index, about


def choose_kind(count: int) -> str:
    """Exact as long as that is fast, then a graph, and lists of short codes where a graph takes too much memory."""
    return "flat" if count < _FLAT_BELOW else "hnsw" if count < _HNSW_BELOW else "ivf_pq"


def make_index(kind: str, width: int, count: int) -> Any:
    """An empty index for inner products.

    Raises:
        ConfigError: there are too few embeddings for the kind.
    """
    faiss = import_faiss()
    factory = {"flat": "Flat", "hnsw": f"HNSW{_HNSW_LINKS},SQfp16"}.get(kind)
    if factory is None:
        codes = [size for size in range(1, _LARGEST_CODE + 1) if width % size == 0 and 4 * size <= width] or [1]
        # np: codes are not put in an order that another kind of search needs, which would take very long.
        factory = f"IVF{_num_lists(count)},PQ{codes[-1]}np"
        if count < 256:
            raise ConfigError(f"kind=ivf_pq learns 256 centroids, and there are {count} embeddings: give kind=flat")
    index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    if kind == "hnsw":
        index.hnsw.efConstruction = _HNSW_EF_CONSTRUCTION
    return index


def search_parameters(about: IndexAbout, wanted: int, allowed: np.ndarray | None, effort: int = 1) -> Any:
    """How thoroughly to search for so many neighbours.

    Args:
        allowed: for each embedding whether it may be found; None for all.
        effort: how many times as much of the index to look through as usual.
    """
    faiss = import_faiss()
    selector = {}
    if allowed is not None:
        selector["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    if about.kind == "flat":
        return faiss.SearchParameters(**selector)
    if about.kind == "hnsw":
        return faiss.SearchParametersHNSW(efSearch=max(128 * effort, wanted), **selector)
    lists = _num_lists(about.count)
    return faiss.SearchParametersIVF(nprobe=min(lists, effort * round(_PROBED * math.sqrt(lists))), **selector)


def import_faiss() -> Any:
    """Raises ConfigError if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "the index is FAISS's, which needs an extra: pip install '.[search]' in the checkout"
        ) from error
    return faiss


def _num_lists(count: int) -> int:
    """A power of 2 near sqrt(count), but no more than can be learned; twice as many take four times as long."""
    return max(1, 2 ** round(math.log2(min(math.sqrt(count), count / _PER_LIST + 1))))


def _num_learned(count: int) -> int:
    return min(count, max(_PER_LIST * _num_lists(count), _LEAST_LEARNED))


def _training_sample(folder: EmbeddingFolder, side: str, count: int, seed: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(seed))
    return folder.vectors(side, np.sort(generator.choice(len(folder), count, replace=False)))


def _digest(folder: EmbeddingFolder, side: str) -> str:
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.embeddings[side]]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def _about_path(index: Path) -> Path:
    return index.with_name(f"{index.name}.json")
