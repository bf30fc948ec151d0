"""What shards are made of: the rows of a table, or the pictures of a folder with captions beside them."""

import csv
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from clip_train.errors import ConfigError, DataError

_IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"])
_IMAGE_COLUMNS = ("filepath", "image_path", "image", "path", "file_name")
_CAPTION_COLUMNS = ("caption", "captions", "title", "text")
_LONGEST_KEY = 80  # a tar's plain header has room for 100 bytes, the extension among them
_LONGEST_CELL = 1 << 24


class Record(NamedTuple):
    """A sample to be.

    Attributes:
        key: its name in the shard.
        image: path of the picture; empty if the row has none.
        captions: None: in the .txt beside the picture.
        columns: for the sample's .json; None: in the .json beside the picture.
    """

    key: str
    image: str
    captions: tuple[str, ...] | None
    columns: Mapping[str, Any] | None


@dataclass(frozen=True)
class TableColumns:
    """Where a table has what. `None` for a column looks for the usual names.

    Attributes:
        image_column: of the paths of the pictures.
        caption_column: of the captions; a cell may hold a list of them.
        save_additional_columns: a list for the sample's .json; `all` is all others.
        image_root: where relative paths begin; None is the folder of the table.
        csv_separator: None looks at the first line.
    """

    image_column: str | None
    caption_column: str | None
    save_additional_columns: Any
    image_root: str | None
    csv_separator: str | None


def read_source(source: str, columns: TableColumns) -> list[Record]:
    """The records of a table (`.csv`, `.tsv`, `.jsonl`, `.parquet`; a glob for several) or of a folder.

    Raises:
        DataError: there is no such source, it cannot be read, has nothing in it, or lacks a column.
        ConfigError: it is of no known kind.
    """
    source = os.path.expanduser(source)
    if os.path.isdir(source):
        return _read_folder(source, columns.save_additional_columns)
    paths = sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else [source]
    if not paths or not os.path.isfile(paths[0]):
        raise DataError(f"source={source} does not exist (working directory {os.getcwd()})")
    rows = chain.from_iterable(_table_records(path, columns) for path in paths)
    records = [record._replace(key=f"{number:09d}") for number, record in enumerate(rows)]
    if not records:
        raise DataError(f"source={source} has no rows")
    return records


def _read_folder(folder: str, additional: Sequence[str] | str) -> list[Record]:
    if additional and additional != "all":
        raise ConfigError("save_additional_columns: of a folder each .json is taken whole (all) or not at all ([])")
    paths = sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder, followlinks=True)
        for file in files
        if os.path.splitext(file)[1].lower() in _IMAGE_SUFFIXES
    )
    if not paths:
        raise DataError(f"source={folder} holds no pictures ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    if not any(os.path.exists(f"{os.path.splitext(path)[0]}.txt") for path in paths):
        example = f"{os.path.splitext(paths[0])[0]}.txt"
        raise DataError(f"source={folder}: no picture has its caption beside it (looked for {example} and the like)")
    keys = _unique_keys(os.path.splitext(os.path.relpath(path, folder))[0] for path in paths)
    return [Record(key, path, captions=None, columns=None if additional else {}) for key, path in zip(keys, paths)]


def _unique_keys(names: Iterable[str]) -> Iterator[str]:
    """Names without the dots and slashes that mean something in a tar of samples; the second of a kind gets `-2`."""
    taken: dict[str, int] = {}
    for name in names:
        plain = re.sub(r"[^\w-]+", "_", name, flags=re.ASCII)[-_LONGEST_KEY:]
        key = plain
        while key in taken:
            taken[plain] += 1
            key = f"{plain}-{taken[plain]}"
        taken[key] = 1
        yield key


def _table_records(path: str, columns: TableColumns) -> Iterator[Record]:
    names, rows = _open_table(path, columns.csv_separator)
    image = _column(path, names, "image_column", columns.image_column, _IMAGE_COLUMNS)
    caption = _column(path, names, "caption_column", columns.caption_column, _CAPTION_COLUMNS)
    additional = columns.save_additional_columns
    if isinstance(additional, str):
        if additional != "all":
            raise ConfigError(f"save_additional_columns={additional} is neither a list of columns nor all")
        additional = [name for name in names if name not in (image, caption)]
    if unknown := [name for name in additional if name not in names]:
        raise DataError(f"save_additional_columns: {path} has no column {unknown[0]} (found: {', '.join(names)})")
    root = columns.image_root or os.path.dirname(path)
    for row in rows:
        location = str(row.get(image) or "")
        if "://" in location:
            raise DataError(
                f"{path} names {location}, not a local file: download with img2dataset, which writes shards"
            )
        located = os.path.join(root, os.path.expanduser(location)) if location else ""
        yield Record("", located, _captions(row.get(caption)), {name: row.get(name) for name in additional})


def _column(path: str, names: Sequence[str], setting: str, wanted: str | None, usual: Sequence[str]) -> str:
    found = [wanted] if wanted else [name for name in usual if name in names]
    if len(found) == 1 and found[0] in names:
        return found[0]
    if wanted:
        raise DataError(f"{setting}={wanted}: {path} has no such column (found: {', '.join(names)})")
    raise DataError(f"{path}: which column? Give {setting}= one of {', '.join(found or names)}")


def _captions(cell: object) -> tuple[str, ...]:
    cells = cell if isinstance(cell, list) else [cell]
    return tuple(text for text in cells if isinstance(text, str) and text.strip())


def _open_table(path: str, separator: str | None) -> tuple[list[str], Iterator[Mapping[str, Any]]]:
    suffix = Path(path).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _open_csv(path, separator)
    if suffix in (".jsonl", ".ndjson"):
        return _open_jsonl(path)
    if suffix == ".parquet":
        return _open_parquet(path)
    raise ConfigError(f"source={path} is neither a folder nor a .csv, .tsv, .jsonl or .parquet table")


def _open_csv(path: str, separator: str | None) -> tuple[list[str], Iterator[Mapping[str, Any]]]:
    csv.field_size_limit(_LONGEST_CELL)
    rows = _csv_rows(path, separator)
    header = next(rows, None)
    if header is None:
        raise DataError(f"source={path} is empty")
    return header, (dict(zip(header, row)) for row in rows)


def _csv_rows(path: str, separator: str | None) -> Iterator[list[str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=separator or ("\t" if "\t" in first else ","))
            try:
                yield from (row for row in reader if row)
            except csv.Error as error:
                raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    except (UnicodeDecodeError, TypeError) as error:  # TypeError: a separator of several letters
        raise DataError(f"{path} is no CSV in UTF-8: {error}") from error


def _open_jsonl(path: str) -> tuple[list[str], Iterator[Mapping[str, Any]]]:
    rows = _jsonl_rows(path)
    first = next(rows, None)
    if first is None:
        raise DataError(f"source={path} is empty")
    return list(first), chain([first], rows)


def _jsonl_rows(path: str) -> Iterator[Mapping[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is no JSON object")
            yield row


def _open_parquet(path: str) -> tuple[list[str], Iterator[Mapping[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(f"source={path}: Parquet needs an extra: pip install '.[parquet]' in the checkout") from error
    try:
        table = parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file: {' '.join(str(error).split())}") from error
    return table.schema_arrow.names, (row for batch in table.iter_batches() for row in batch.to_pylist())
