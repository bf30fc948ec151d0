"""Ends a process in which nothing is finished any more, and says where it hangs: no rank waits long for a dead one."""

import faulthandler
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import lightning as L
from lightning.pytorch.callbacks import Callback

from clip_train.distributed import group_size, host_group
from clip_train.heartbeat import beat, last_beat
from clip_train.training.launch import started_by_lightning

EXIT_STALLED = 76

_LONGEST_NAP = 5.0
_DUMP_SECONDS = 10.0  # the disk may be what hangs
_OTHERS_SECONDS = 5.0  # until the other ranks have written theirs: what started us may kill them when we leave
_PARENT_SECONDS = 60.0
_INTERPRETER_SECONDS = 30.0
_GROUP_MARGIN = timedelta(minutes=10)


class Watchdog(Callback):
    """Watches this process from a thread of its own, which runs while the main thread waits in a collective.

    When it fires, it writes the stacks of all threads, and the process exits at once with code 76. The other ranks'
    watchdogs do the same at about the same time, as no rank can finish a step alone. It stands first among callbacks.

    Args:
        folder: where `rank_<number>.txt` goes.
        timeout: seconds without a heartbeat; None never fires.
        first_timeout: the same until the first step has ended.
    """

    def __init__(self, folder: Path, timeout: float | None, first_timeout: float) -> None:
        self.folder, self.timeout, self.first_timeout = folder, timeout, first_timeout
        self._limit = first_timeout
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def setup(self, trainer: L.Trainer, pl_module, stage: str) -> None:
        if group_size() > 1:
            host_group(timeout=group_timeout(self.timeout, self.first_timeout))  # the first call makes it
        if self.timeout is not None:
            beat()
            self._thread = threading.Thread(target=self._watch, args=(trainer.global_rank,), daemon=True)
            self._thread.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        beat()
        if self.timeout is not None:
            self._limit = self.timeout

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._end()

    def teardown(self, trainer, pl_module, stage: str) -> None:
        self._end()

    def _end(self) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._thread = None

    def _watch(self, rank: int) -> None:
        waking = time.monotonic()
        suspended = 0.0  # what is stopped and continued, as a suspended job is, has not hung meanwhile
        seen = last_beat()
        while not self._ended.wait(nap := min(_LONGEST_NAP, self._limit / 10)):
            now = time.monotonic()
            if last_beat() > seen:
                seen, suspended = last_beat(), 0.0
            suspended += max(0.0, now - waking - 2 * nap - 1)
            waking = now
            idle = now - seen - suspended
            if idle > self._limit:
                self._fire(rank, idle)
            # If the main thread keeps the interpreter, this thread stands still too; then at least this tells where.
            faulthandler.dump_traceback_later(self._limit - idle + _INTERPRETER_SECONDS)

    def _fire(self, rank: int, idle: float) -> NoReturn:
        path = self.folder / f"rank_{rank:05d}.txt"
        message = f"rank {rank} has finished nothing for {timedelta(seconds=round(idle))}"
        dump = threading.Thread(target=_dump_stacks, args=(path, message), daemon=True)
        dump.start()
        dump.join(_DUMP_SECONDS)
        # Not through `logging`, whose lock the main thread may hold.
        os.write(2, f"clip-train: error: {message}: {path} has its Python stacks; exit code {EXIT_STALLED}\n".encode())
        if started_by_lightning():
            _end_parent()  # which would take this exit for a crash and kill the others before they have told
        elif group_size() > 1:
            time.sleep(_OTHERS_SECONDS)
        os._exit(EXIT_STALLED)


def group_timeout(timeout: float | None, first_timeout: float) -> timedelta:
    """How long a collective may take: longer than the watchdog waits, as that says more than an expired collective."""
    return timedelta(seconds=max(timeout or 0, first_timeout)) + _GROUP_MARGIN


def _dump_stacks(path: Path, message: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        file.write(
            f"{message}, {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()} on {os.uname().nodename}\n\n"
        )
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.flush()
        os.fsync(file.fileno())


def _end_parent() -> None:
    """Wait for the process that started this one to leave by its own watchdog; it may be the one that hangs."""
    parent, end = os.getppid(), time.monotonic() + _PARENT_SECONDS
    while os.getppid() == parent:
        if time.monotonic() > end:
            os.kill(parent, signal.SIGKILL)
        time.sleep(0.1)
