"""Lists of samples to keep: sorted 128-bit numbers in a .npy file, as DataComp publishes them, mapped into memory.

Lists in other forms are brought into this one first: uids from text or Parquet, names of samples by a hash of 128 bits.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from clip_train.data.files import whole_file
from clip_train.errors import ConfigError, DataError, first_line

_PAIR = np.dtype("u8,u8")  # high and low 64 bits
_UID = re.compile(r"[0-9a-fA-F]{1,32}", re.ASCII)
_AT_ONCE = 1 << 22
_WORD = (1 << 64) - 1


def uid_number(uid: object) -> int | None:
    """The number that a uid of up to 32 hexadecimal digits stands for; None if it is no such uid."""
    return int(uid, 16) if isinstance(uid, str) and _UID.fullmatch(uid) else None


def key_number(key: str) -> int:
    """The number that stands for a sample's name."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest())


def prepare_list(setting: str, path: str, folder: str) -> str:
    """The .npy file of a list, checked; written to `folder` if the list has another form.

    Args:
        setting: `uids` (.npy, .parquet with a column uid, or text with one in a line) or `keys` (text).
        path: the list.
        folder: where a converted list goes.

    Raises:
        ConfigError: the list cannot be of this form.
        DataError: it cannot be read, is damaged, empty, or not sorted.
    """
    name = f"{setting}={path}"
    if not os.path.isfile(path):
        raise DataError(f"{name}: no such file")
    if Path(path).suffix == ".npy":
        if setting == "keys":
            raise ConfigError(f"{name} is a list of uids: give uids={path}")
        _check_sorted(open_list(path, name), name)
        return path
    numbers = _numbers(setting, path, name)
    blocks = []
    while block := list(islice(numbers, _AT_ONCE)):
        blocks.append(np.array([(number >> 64, number & _WORD) for number in block], _PAIR))
    if not blocks:
        raise DataError(f"{name} is empty")
    converted = os.path.join(folder, f"{setting}.npy")
    with whole_file(converted) as file:
        np.save(file, np.sort(np.concatenate(blocks)))
    return converted


def _numbers(setting: str, path: str, name: str) -> Iterator[int]:
    if setting == "keys":
        yield from map(key_number, _lines(path, name))
        return
    uids = _parquet_uids(path, name) if Path(path).suffix == ".parquet" else _lines(path, name)
    for place, uid in enumerate(uids, 1):
        number = uid_number(uid)
        if number is None:
            raise DataError(f"{name}, entry {place}: {str(uid)[:40]!r} is no uid of up to 32 hexadecimal digits")
        yield number


def _lines(path: str, name: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            yield from filter(None, map(str.strip, file))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name} cannot be read as text: {error}") from error


def _parquet_uids(path: str, name: str) -> Iterator[object]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(f"{name}: Parquet needs an extra: pip install '.[parquet]' in the checkout") from error
    try:
        table = parquet.ParquetFile(path)
        if "uid" not in table.schema_arrow.names:
            raise DataError(f"{name} has no column uid; there are {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(columns=["uid"]):
            yield from batch.column(0).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{name} cannot be read: {first_line(error)}") from error


@lru_cache(maxsize=1)
def open_list(path: str, name: str = "") -> np.ndarray:
    """The list (n,) of pairs of words, mapped into memory: a process holds only the pages that it looks at.

    Raises:
        DataError: it is no such list, or is empty.
    """
    name = name or path
    try:
        pairs = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{name} is no whole .npy file: {first_line(error)}") from error
    if not isinstance(pairs, np.ndarray) or pairs.dtype != _PAIR or pairs.ndim != 1:
        raise DataError(
            f"{name} holds {getattr(pairs, 'dtype', 'no array')} of shape {getattr(pairs, 'shape', ())}:"
            ' a list of uids is of numpy.dtype("u8,u8") with one axis'
        )
    if not len(pairs):
        raise DataError(f"{name} is empty")
    return pairs


def _check_sorted(pairs: np.ndarray, name: str) -> None:
    """Each uid is looked up by halving, which would not find those that are out of order."""
    for start in range(0, len(pairs) - 1, _AT_ONCE):
        high, low = (pairs[word][start : start + _AT_ONCE + 1] for word in ("f0", "f1"))
        falls = (high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))
        if falls.any():
            place = start + int(falls.argmax()) + 1
            raise DataError(f"{name} is not sorted, first at entry {place}: sort it with numpy.sort")


def find_in_list(pairs: np.ndarray, numbers: Iterable[int]) -> list[tuple[int, int]]:
    """For each number, which entries of the list `[first, end)` are it; a list may name a sample several times."""
    high, low = pairs["f0"], pairs["f1"]
    words = np.array([divmod(number, 1 << 64) for number in numbers], dtype=np.uint64).reshape(-1, 2)
    first = np.searchsorted(high, words[:, 0], "left")
    end = np.searchsorted(high, words[:, 0], "right")
    found = []
    for (_, low_word), begin, stop in zip(words, first.tolist(), end.tolist()):
        if begin < stop:
            inside = low[begin:stop]
            begin, stop = (begin + int(np.searchsorted(inside, low_word, side)) for side in ("left", "right"))
        found.append((begin, stop))
    return found
