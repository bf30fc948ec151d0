"""How far an evaluation is: a line of the log now and then."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

from clip_train.distributed import group_size
from clip_train.heartbeat import beat

_SECONDS_BETWEEN_LINES = 10.0

log = logging.getLogger(__name__)


def told(loader: Iterable[Any], total: int) -> Iterator[Any]:
    """The batches of a loader, and what the log has to say of them: nothing, if they take a few seconds.

    Args:
        loader: of this rank's share, which is taken for as large as the others'.
        total: images of all ranks.
    """
    progress = Progress(total)
    for batch in loader:
        yield batch
        progress.add(len(batch["image"]))
    progress.end()


class Progress:
    """Tells of images that are done.

    Args:
        total: images of all ranks.
    """

    def __init__(self, total: int) -> None:
        self._begin = self._said = time.monotonic()
        self._done, self._total = 0, total

    def add(self, images: int) -> None:
        """So many more on this rank, and about as many on the others."""
        beat()
        self._done += group_size() * images
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            done, pace = min(self._done, self._total), _pace(self._done, now - self._begin)
            log.info("%s of %s images, %s images/s", f"{done:,}", f"{self._total:,}", pace)

    def end(self) -> None:
        """All are done."""
        if self._said > self._begin:
            seconds = time.monotonic() - self._begin
            log.info("%s images in %.0f s, %s images/s", f"{self._total:,}", seconds, _pace(self._total, seconds))


def _pace(count: int, seconds: float) -> str:
    return f"{count / max(seconds, 1e-9):,.0f}"
