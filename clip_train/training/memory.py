"""Running out of memory in training: said in one line, provoked on a CPU where Linux would rather kill."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_train.errors import OutOfMemoryError
from clip_train.out_of_memory import is_out_of_memory

_GROUP = Path("/sys/fs/cgroup")


@contextmanager
def explained_out_of_memory(micro_batch_size: int | None, local_batch: int) -> Iterator[None]:
    """Turn a failed allocation into an error that names the setting.

    Raises:
        OutOfMemoryError: with a value of `micro_batch_size` to try.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        at_once = min(micro_batch_size or local_batch, local_batch)
        tried = "null" if micro_batch_size is None else micro_batch_size
        remedy = f"try micro_batch_size={at_once // 2}, or auto" if at_once > 1 else "take a smaller model"
        if micro_batch_size is not None:
            remedy += "; model.grad_checkpointing=blocks saves more"
        raise OutOfMemoryError(
            f"out of memory with micro_batch_size={tried} ({at_once} pairs at once on a device): {remedy}"
        ) from error


@contextmanager
def host_memory_limit(processes: int) -> Iterator[None]:
    """Make allocations fail that exceed this process's share of the free memory; Linux grants them, and kills later.

    Where there is no such limit to set, nothing is limited.
    """
    try:
        import resource

        used = _kilobytes("/proc/self/status", "VmData")
        free = min(_kilobytes("/proc/meminfo", "MemAvailable"), _free_in_group())
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    except (ImportError, OSError, ValueError):
        yield
        return
    limit = int(1024 * (used + free / processes))
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _free_in_group() -> float:
    """Kilobytes that the control group of a container or job still allows."""
    try:
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return (limit - used + int(statistics.get("inactive_file", 0))) / 1024  # what files left there makes room
    except (OSError, ValueError):  # no such group, or no limit
        return math.inf


def _kilobytes(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise ValueError(f"{path} has no {name}")
