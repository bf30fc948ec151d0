"""Which samples a condition on their metadata leaves: SQL's WHERE, by DuckDB."""

import threading
from functools import lru_cache
from typing import Any

import numpy as np

from clip_train.embedding.folder import EmbeddingFolder
from clip_train.embedding.options import RESERVED_COLUMNS
from clip_train.errors import ConfigError, DataError, first_line

_FILE, _ROW = "clip_train_file", "clip_train_row"
_CONDITIONS_KEPT = 8
_LONGEST = 60  # seconds for a condition
_MEMORY = "4GB"  # for a condition


class MetadataFilter:
    """Conditions such as `price < 20 and category = 'shoes'` on the columns of a folder's metadata.

    A condition is read as one expression, and can reach nothing but the metadata files.

    Raises:
        ConfigError: DuckDB is not installed.
        DataError: it cannot read the metadata, or they have a column whose name is needed.
    """

    def __init__(self, folder: EmbeddingFolder) -> None:
        try:
            import duckdb
        except ImportError as error:
            raise ConfigError("where= needs an extra: pip install '.[search]' in the checkout") from error
        from pyarrow import ArrowException

        self._errors = (duckdb.Error, ArrowException, OSError, ValueError)  # ValueError: of half a surrogate pair
        self._folder = folder
        self._starts = folder.ends - np.asarray(folder.counts)
        self._connection = connection = duckdb.connect()
        connection.execute(f"SET memory_limit = '{_MEMORY}'")
        connection.execute("SET temp_directory = ''")  # else what does not fit into memory would fill the disk
        connection.execute("SET allowed_directories = $1", [[str(folder.metadata[0].parent)]])
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        place = f"file_index AS {_FILE}, file_row_number AS {_ROW}"  # numbers, as names would be one text per sample
        table, files = "FROM read_parquet($1, union_by_name = true)", [[str(path) for path in folder.metadata]]
        try:
            columns = connection.sql(f"SELECT * {table}", params=files).columns
            self._rows: Any = connection.sql(f"SELECT *, {place} {table}", params=files)
        except self._errors as error:
            raise DataError(f"where= cannot read the metadata of {folder.path}: {first_line(error)}") from error
        if taken := [name for name in columns if name.lower() in RESERVED_COLUMNS]:
            raise DataError(
                f"where= needs the name of the column {taken[0]!r} of the metadata of {folder.path} itself: write them"
                " without it, or under another name"
            )
        self._kept = lru_cache(_CONDITIONS_KEPT)(self._find)

    def __call__(self, where: str) -> np.ndarray:
        """For each sample whether it meets the condition. Raises ConfigError if the condition cannot be used."""
        return self._kept(where)

    def _find(self, where: str) -> np.ndarray:
        from pyarrow import RecordBatchReader

        allowed = np.zeros(len(self._folder), dtype=bool)
        stop = threading.Timer(_LONGEST, self._connection.interrupt)
        stop.start()
        try:
            found = self._rows.filter(where).project(f"{_FILE}, {_ROW}")
            for batch in RecordBatchReader.from_stream(found):  # by and by: all at once would take 16 bytes each
                files, rows = (column.to_numpy() for column in batch.columns)
                allowed[self._starts[files] + rows] = True
        except self._errors as error:
            raise ConfigError(f"where={where}: {first_line(error)}") from error
        finally:
            stop.cancel()
        return allowed
