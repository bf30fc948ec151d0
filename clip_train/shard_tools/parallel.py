"""A function over many tasks, in processes that end when this one does."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from clip_train.errors import ClipTrainError, ConfigError

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many
Task = TypeVar("Task")
Result = TypeVar("Result")


def count_workers(setting: Any) -> int:
    """`auto` is one process per processor that this process may use. Raises ConfigError if it is no such number."""
    if setting == "auto":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not isinstance(setting, int) or isinstance(setting, bool) or setting < 1:
        raise ConfigError(f"num_workers={setting} is neither a whole number of at least 1 nor auto")
    return setting


def run_parallel(
    function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int
) -> Generator[Result, None, None]:
    """Yield the results as they come, in no order. With one worker everything happens in this process.

    Tasks are taken from the iterable as workers get free. The first exception of a task is raised here; what has not
    begun is dropped.
    """
    if num_workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("forkserver")  # import once, fork often; no threads are forked
    context.set_forkserver_preload([_module(function)])
    remaining = iter(tasks)
    with ProcessPoolExecutor(num_workers, context, _init_worker) as pool:
        running = {pool.submit(function, task) for task in islice(remaining, 2 * num_workers)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(function, task) for task in islice(remaining, len(done))}
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise ClipTrainError(
                "a worker process was killed, most often for want of memory: give fewer num_workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _module(function: Callable[..., Any]) -> str:
    return (function.func if isinstance(function, partial) else function).__module__


def _init_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal signals every process; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)
