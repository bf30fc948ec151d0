"""Files that are whole or absent: written under a temporary name, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from platformdirs import user_cache_path

UNFINISHED = ".tmp"  # how names end of files that are being written, or were when their program was killed


def user_cache() -> Path:
    """Where the user's copies of data go: `CLIP_TRAIN_CACHE`, if set."""
    return Path(os.environ.get("CLIP_TRAIN_CACHE") or user_cache_path("clip_train"))


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name when it is complete: a crash never leaves half of it under `path`."""
    temporary = f"{path}.{os.getpid()}{UNFINISHED}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` whole or not at all, whatever crashes, or writes the same at the same time."""
    with whole_file(path) as file:
        file.write(content)


def utf8(text: str) -> bytes:
    """A text as files hold it: half a surrogate pair, as JSON and names of files can have it, is a question mark."""
    return text.encode("utf-8", "replace")
