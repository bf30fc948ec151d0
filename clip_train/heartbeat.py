"""The pulse of a process and of its loader workers: whatever takes long says that it goes on."""

import multiprocessing
import time

# Shared with the processes forked from this one; monotonic time is the same for all of a machine.
_last = multiprocessing.RawValue("d", time.monotonic())


def beat() -> None:
    """Something was finished: a step, a batch of an evaluation, a piece of a download."""
    _last.value = time.monotonic()


def last_beat() -> float:
    """When, by `time.monotonic`."""
    return _last.value
