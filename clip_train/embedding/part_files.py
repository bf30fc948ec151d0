"""A part on disk, in the layout that clip-retrieval, autofaiss and embedding_reader read.

    img_emb/img_emb_00000.npy           one row per sample
    text_emb/text_emb_00000.npy
    metadata/metadata_00000.parquet     the same rows: key, caption, where the picture is

The metadata are written last and say what the part was made of, so that a part is there if they are.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_train.data.files import utf8, whole_file
from clip_train.embedding.batches import Row
from clip_train.embedding.options import IMAGE, OWN_COLUMNS, TEXT
from clip_train.errors import ConfigError
from clip_train.shard_tools.damage import Damage

_FOLDERS = {IMAGE: "img_emb", TEXT: "text_emb"}
_ABOUT = b"clip_train"
_ROWS_PER_GROUP = 2048  # of the metadata: who wants one row reads its group


def embedding_path(folder: Path, side: str, number: int) -> Path:
    """Of the embeddings of a part's images or texts."""
    return folder / _FOLDERS[side] / f"{_FOLDERS[side]}_{number:05d}.npy"


def metadata_path(folder: Path, number: int) -> Path:
    """Of a part's metadata."""
    return folder / "metadata" / f"metadata_{number:05d}.parquet"


def check_pyarrow() -> None:
    """Raises ConfigError if what writes Parquet is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "metadata are Parquet, which needs an extra: pip install '.[parquet]' in the checkout"
        ) from error


def write_part(
    folder: Path,
    number: int,
    stamp: str,
    embeddings: Mapping[str, np.ndarray],
    rows: Sequence[Row],
    fields: Sequence[str],
    bad: Sequence[Damage],
) -> None:
    """Write a part's files, each whole or not at all, the metadata last.

    Args:
        stamp: of what was embedded.
        embeddings: of its images, texts or both.
        rows: of the metadata.
        fields: columns of the metadata beside those that all sets have.
        bad: samples that were left out.
    """
    from pyarrow import parquet

    metadata = metadata_path(folder, number)
    metadata.unlink(missing_ok=True)  # else it would speak for other embeddings
    metadata.parent.mkdir(parents=True, exist_ok=True)
    for side, values in embeddings.items():
        path = embedding_path(folder, side, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            np.save(file, values)
    about = {"stamp": stamp, "samples": len(rows), "bad": bad}
    table = _table(rows, fields).replace_schema_metadata({_ABOUT: json.dumps(about)})
    with whole_file(metadata) as file:
        parquet.write_table(table, file, row_group_size=_ROWS_PER_GROUP)


def read_about(folder: Path, number: int, sides: Sequence[str], stamp: str) -> tuple[int, list[Damage]] | None:
    """How many samples a finished part has, and those left out; None if it is not finished, or of something else."""
    from pyarrow import ArrowException, parquet

    try:
        schema = parquet.read_schema(metadata_path(folder, number))
        about = json.loads((schema.metadata or {})[_ABOUT])
        counts = [len(np.load(embedding_path(folder, side, number), mmap_mode="r")) for side in sides]
    except (OSError, EOFError, ArrowException, KeyError, ValueError):
        return None
    if about["stamp"] != stamp or any(count != about["samples"] for count in counts):
        return None
    return about["samples"], [Damage(*damage) for damage in about["bad"]]


def _table(rows: Sequence[Row], fields: Sequence[str]) -> Any:
    import pyarrow as pa

    types = {"offset": pa.int64(), "size": pa.int64()}
    columns = {
        name: pa.array([_clean(row[name]) for row in rows], types.get(name, pa.string())) for name in OWN_COLUMNS
    }
    for name in fields:
        columns[name] = _column([row[name] for row in rows])
    return pa.table(columns)


def _column(values: list[Any]) -> Any:
    """Numbers, truth values or texts, if all are of one kind; else their JSON, as a column has one type."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    for allowed, kind in (
        ({bool}, pa.bool_()),
        ({int}, pa.int64()),
        ({int, float}, pa.float64()),
        ({str}, pa.string()),
    ):
        if kinds and kinds <= allowed:
            try:
                return pa.array([_clean(value) for value in values], kind)
            except pa.ArrowException:  # a whole number of more than 64 bits
                break
    if not kinds:
        return pa.nulls(len(values))
    texts = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values)
    return pa.array([None if value is None else _clean(text) for value, text in zip(values, texts)], pa.string())


def _clean(value: Any) -> Any:
    """A text as Parquet can hold it."""
    return utf8(value).decode() if isinstance(value, str) else value
