"""Small files that lie beside shards, here or elsewhere: sizes, statistics, class names."""

import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from clip_train.data.remote import open_remote, scheme_of
from clip_train.data.retries import is_permanent, with_retries
from clip_train.errors import DataError


def sibling(shard: str, name: str) -> str:
    """Another file in the shard's folder, or relative to it (`../name`); a query, such as an access token, stays."""
    if not scheme_of(shard):
        return os.path.join(os.path.dirname(shard), name)
    parts = urlsplit(shard)
    return urlunsplit(parts._replace(path=os.path.normpath(os.path.join(os.path.dirname(parts.path), name))))


def read_if_there(address: str, retries: int = 10, timeout: float = 60.0) -> bytes | None:
    """The content of a small file; None if it is not there, or access is denied, as buckets say that do not list.

    Args:
        address: a path or a URL.
        retries, timeout: of a download: how often more it is tried, and the seconds without a byte.

    Raises:
        DataError: it seems to be there and cannot be read.
    """
    if not scheme_of(address):
        try:
            return Path(address).expanduser().read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"{address} cannot be read: {error.strerror}") from error

    def attempt() -> bytes | None:
        try:
            with open_remote(address, timeout) as stream:
                return b"".join(stream.chunks)
        except Exception as error:
            if is_permanent(error):
                return None
            raise

    return with_retries(attempt, address, retries)
