"""Staging of what the loaders will need next, in the background of one process per node."""

import threading
import time
from collections.abc import Callable, Iterator

from clip_train.data.retries import Cancelled
from clip_train.data.staging import Stager

_LEAST_INTERVAL_S = 1.0
_SECONDS_TO_LEAVE = 2.0
_PAUSE = 20  # times as long as planning took


class StageAhead:
    """Stages shards in the order in which they will be needed, several at once, up to half the cache ahead.

    Upcoming copies that are there already are touched, so that they are not evicted for others. After an error it
    stops, and `check` raises it.

    Args:
        stager: the node's cache.
        urls_ahead: from a position of the stream, the shards that the node needs from there on, in order of first need.
        position: where the run begins.
        threads: downloads at once.
    """

    def __init__(
        self, stager: Stager, urls_ahead: Callable[[int], Iterator[str]], position: int = 0, threads: int = 4
    ) -> None:
        self._stager, self._urls_ahead, self._position = stager, urls_ahead, position
        self._budget = stager.cache.max_bytes // 2
        self._first_guess = max(self._budget // threads, 1)  # of a shard's size, while none is known
        self._missing: list[str] = []
        self._in_flight: set[str] = set()
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._due = threading.Event()  # the plan no longer holds: samples were seen, or a shard was staged
        self._planned = threading.Condition()
        targets = [self._keep_planning, *[self._keep_downloading] * threads]
        self._threads = [threading.Thread(target=self._guard, args=(target,), daemon=True) for target in targets]
        self._due.set()
        for thread in self._threads:
            thread.start()

    def advance(self, position: int) -> None:
        """Tell how far the run has come. Returns at once."""
        self._position = position
        self._due.set()

    def check(self) -> None:
        """Raise the error that ended the staging, if one did.

        Raises:
            DataError: a shard cannot be staged.
        """
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop. A download on its way is left as it is, for a later process to go on with."""
        self._stop()
        for thread in self._threads:
            thread.join(_SECONDS_TO_LEAVE / len(self._threads))  # one that waits for the network ends with the process

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Cancelled:
            pass
        except BaseException as error:
            self._error = self._error or error
            self._stop()

    def _stop(self) -> None:
        self._closed.set()
        self._due.set()
        with self._planned:
            self._planned.notify_all()

    def _keep_planning(self) -> None:
        while self._due.wait() and not self._closed.is_set():
            self._due.clear()
            begin = time.monotonic()
            missing = self._plan()
            spent = time.monotonic() - begin
            with self._planned:
                self._missing = [url for url in dict.fromkeys(missing) if url not in self._in_flight]
                self._planned.notify_all()
            self._closed.wait(max(_LEAST_INTERVAL_S, _PAUSE * spent))  # the trainer needs the interpreter, too

    def _plan(self) -> list[str]:
        """The upcoming shards that are not staged, as far as the budget reaches; touches those that are."""
        staged: list[str] = []
        missing: list[str] = []
        total = typical = 0
        for url in self._urls_ahead(self._position):
            size = self._stager.cache.size(url)
            typical = max(typical, size or 0)
            total += size or typical or self._first_guess
            if total > self._budget and (staged or missing):
                break
            (missing if size is None else staged).append(url)
        for url in reversed(staged):  # what is needed first is evicted last
            self._stager.cache.touch(url)
        return missing

    def _keep_downloading(self) -> None:
        while (url := self._next()) is not None:
            self._stager.stage(url, cancelled=self._closed.is_set)
            with self._planned:
                self._in_flight.discard(url)
            self._due.set()

    def _next(self) -> str | None:
        with self._planned:
            while not self._missing and not self._closed.is_set():
                self._planned.wait()
            if self._closed.is_set():
                return None
            url = self._missing.pop(0)
            self._in_flight.add(url)
            return url
