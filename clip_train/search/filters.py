"""Which samples a condition on their metadata leaves: SQL's WHERE, by DuckDB."""

import threading
from functools import lru_cache
from typing import Any

import numpy as np

from clip_train.embedding.folder import EmbeddingFolder
from clip_train.errors import ConfigError, first_line

_FILE = "clip_train_file"
_CONDITIONS_KEPT = 16
_LONGEST = 60  # seconds for a condition


class MetadataFilter:
    """Conditions such as `price < 20 and category = 'shoes'` on the columns of a folder's metadata.

    A condition is read as one expression, and can reach nothing but the metadata files.

    Raises:
        ConfigError: DuckDB is not installed.
    """

    def __init__(self, folder: EmbeddingFolder) -> None:
        try:
            import duckdb
        except ImportError as error:
            raise ConfigError("where= needs an extra: pip install 'clip_train[search]'") from error
        self._error = duckdb.Error
        self._folder = folder
        files = [str(path) for path in folder.metadata]
        self._starts = dict(zip(files, (folder.ends - np.asarray(folder.counts)).tolist()))
        self._connection = connection = duckdb.connect()
        connection.execute("SET allowed_directories = $1", [[str(folder.metadata[0].parent)]])
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        table = f"read_parquet($1, union_by_name = true, filename = '{_FILE}', file_row_number = true)"
        self._rows: Any = connection.sql(f"FROM {table}", params=[files])
        self._kept = lru_cache(_CONDITIONS_KEPT)(self._find)

    def __call__(self, where: str) -> np.ndarray:
        """For each sample whether it meets the condition. Raises ConfigError if the condition cannot be used."""
        return self._kept(where)

    def _find(self, where: str) -> np.ndarray:
        stop = threading.Timer(_LONGEST, self._connection.interrupt)
        stop.start()
        try:
            found = self._rows.filter(where).project(f"{_FILE}, file_row_number").fetchnumpy()
        except (self._error, ValueError) as error:  # ValueError: of half a surrogate pair
            raise ConfigError(f"where={where}: {first_line(error)}") from error
        finally:
            stop.cancel()
        allowed = np.zeros(len(self._folder), dtype=bool)
        for file in np.unique(found[_FILE].astype(str)):
            allowed[self._starts[file] + found["file_row_number"][found[_FILE] == file]] = True
        return allowed
