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
    begin = said = time.monotonic()
    done = 0
    for batch in loader:
        yield batch
        beat()
        done += group_size() * len(batch["image"])
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said = now
            log.info("%s of %s images, %s images/s", f"{min(done, total):,}", f"{total:,}", _pace(done, now - begin))
    if said > begin:
        seconds = time.monotonic() - begin
        log.info("%s images in %.0f s, %s images/s", f"{total:,}", seconds, _pace(total, seconds))


def _pace(count: int, seconds: float) -> str:
    return f"{count / max(seconds, 1e-9):,.0f}"
