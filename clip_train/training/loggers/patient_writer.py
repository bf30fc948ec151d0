"""Files that grow while a run lasts, on a disk that may fill up: the run goes on, what cannot be written waits."""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class PatientWriter(Generic[T]):
    """Keeps what cannot be written in memory, says so once, and tries again with whatever comes next.

    Args:
        path: what is written, for the messages.
        write: writes all of a list or, with an OSError, nothing of it.
    """

    def __init__(self, path: Path, write: Callable[[list[T]], None]) -> None:
        self.path, self._write = path, write
        self._waiting: list[T] = []
        self._failing = False

    def add(self, items: list[T]) -> None:
        """Write these and all that waits; what fails waits on."""
        self._waiting += items
        if not self._waiting:
            return
        writing = list(self._waiting)
        try:
            self._write(writing)
        except OSError as error:
            if not self._failing:
                self._failing = True
                log.error("CANNOT WRITE %s: %s; kept in memory until it can be written", self.path, error.strerror)
            return
        del self._waiting[: len(writing)]
        if self._failing:
            self._failing = False
            log.warning("%s can be written again: %d entries caught up", self.path, len(writing))

    def close(self) -> None:
        """Try a last time, and say what is lost."""
        self.add([])
        if self._waiting:
            log.error("%d entries of %s could not be written", len(self._waiting), self.path)


def append_whole(path: Path, content: bytes) -> None:
    """Append all of `content`, or leave the file as it was.

    Raises:
        OSError: the disk is full, read-only, or gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    size = os.fstat(file).st_size
    try:
        try:
            while content:  # a disk that fills up takes a part first, and refuses the rest
                content = content[os.write(file, content) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
