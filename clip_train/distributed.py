"""The process group, for code that must also run without one."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import pairwise
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from clip_train.errors import ClipTrainError, DataError, FaultError, OutOfMemoryError, first_line
from clip_train.out_of_memory import is_out_of_memory

T = TypeVar("T")

log = logging.getLogger(__name__)
_WORKER_KILLED = re.compile(r"DataLoader worker \(pid")  # a fault in one begins with "Caught"


def group_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in the group; 1 where there is no process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def group_rank(group: dist.ProcessGroup | None = None) -> int:
    """This rank in the group; 0 where there is no process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def gathers_rounded() -> bool:
    """Whether FSDP can gather some weights in bf16 and others as they are: from torch 2.15 on."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return "param_dtype_override_fn" in MixedPrecisionPolicy.__dataclass_fields__


_around_exchanges: Callable[[], AbstractContextManager] = nullcontext


def exchanging() -> AbstractContextManager:
    """To be put around what waits for other ranks, so that it can be timed."""
    return _around_exchanges()


@contextmanager
def around_exchanges(make: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Inside, `make()` is what `exchanging` returns.

    It is the same for all threads, as backward on an accelerator runs in one of its own.
    """
    global _around_exchanges
    before, _around_exchanges = _around_exchanges, make
    try:
        yield
    finally:
        _around_exchanges = before


_host_world: "WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = WeakKeyDictionary()


def host_group(group: dist.ProcessGroup | None = None, timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """The group, if it is of gloo, or a gloo group of all ranks: for what hosts must know without waiting for devices.

    All ranks must make the first call, as that makes the group of all. None for some of the ranks on another backend:
    a group cannot be made by those alone without confusing the names of later ones.

    Args:
        timeout: of a collective, if the group is made by this call; None is half an hour.
    """
    group = group or dist.group.WORLD
    assert group is not None
    if dist.get_backend(group) == "gloo":
        return group
    if group is not dist.group.WORLD:
        return None
    if group not in _host_world:
        _host_world[group] = dist.new_group(backend="gloo", timeout=timeout)  # pyright: ignore[reportArgumentType]
    return _host_world[group]


def max_on_hosts(value: int) -> int:
    """The greatest of all ranks' numbers, on every rank."""
    greatest = torch.tensor(value)
    if group_size() > 1:
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group=host_group())
    return int(greatest)


def own_part(count: int) -> range:
    """Which of so many this rank has, if every one has a contiguous part."""
    first, last = (count * (group_rank() + step) // group_size() for step in (0, 1))
    return range(first, last)


def gather_parts(local: Tensor, count: int) -> Tensor:
    """The rows of all ranks, in rank order, where each has those of its `own_part(count)`. No gradients."""
    if group_size() == 1:
        return local
    edges = [count * rank // group_size() for rank in range(group_size() + 1)]
    sizes = [last - first for first, last in pairwise(edges)]
    largest = max(sizes)
    padded = local.new_zeros(largest, *local.shape[1:])
    padded[: len(local)] = local
    gathered = local.new_empty(len(sizes), *padded.shape)
    dist.all_gather_into_tensor(gathered.view(-1, *padded.shape[1:]), padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes)])


def sum_over_ranks(local: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over ranks, on every rank, in place. No gradients."""
    if group_size(group) > 1:
        with exchanging():
            dist.all_reduce(local, group=group)
    return local


def gather_objects(local: list[T], group: dist.ProcessGroup | None = None) -> list[T]:
    """The entries of all ranks' lists, in rank order."""
    if group_size(group) == 1:
        return local
    gathered: list[list[T]] = [[] for _ in range(group_size(group))]
    dist.all_gather_object(gathered, local, group=group)
    return [entry for part in gathered for entry in part]


def gather_on_first(local: list[T]) -> list[T]:
    """The entries of all ranks' lists, in rank order, on the first rank; on the others nothing."""
    if group_size() == 1:
        return local
    gathered: list[list[T]] | None = [[] for _ in range(group_size())] if group_rank() == 0 else None
    dist.gather_object(local, gathered, dst=0, group=host_group())
    return [entry for part in gathered or [] for entry in part]


def of_first_rank(local: T) -> T:
    """The first rank's value, on every rank: for what they might find out differently, such as the time."""
    return gather_objects([local])[0]


def raise_everywhere(error: str) -> None:
    """Raise on all ranks if any rank has an error, so that none waits for one that is gone.

    Raises:
        DataError: with the first rank's message.
    """
    if errors := gather_objects([error] if error else []):
        raise DataError(errors[0])


@contextmanager
def agreed(at_once: int | None = None) -> Iterator[None]:
    """What goes wrong inside on any rank is raised on all, when all are through. No rank may wait for another inside.

    Args:
        at_once: pictures or texts of a forward pass, if there are any inside: what to lower if memory does not suffice.

    Raises:
        DataError: with the first line of a rank. Where there is one rank only, its own error.
        FaultError: what has gone wrong is not the user's to mend; the rank logs its traceback.
    """
    said: list[tuple[str, bool]] = []
    try:
        yield
    except Exception as error:
        known = _known(error, at_once)
        if group_size() == 1:
            if known in (error, None):
                raise
            raise known from error
        if known is None:
            log.critical("a fault on rank %d, which ends all", group_rank(), exc_info=True)
        line = str(known) if known else f"rank {group_rank()}: {type(error).__name__}: {first_line(error)}"
        said.append((line, known is None))
    group = host_group() if group_size() > 1 else None  # of the hosts, as a device may be what has failed
    if errors := gather_objects(said, group):
        line, fault = errors[0]
        raise FaultError(line) if fault else DataError(line)


def _known(error: Exception, at_once: int | None) -> ClipTrainError | None:
    """An error in words for the user; None if it is not the user's to mend."""
    if isinstance(error, ClipTrainError):
        return error
    if is_out_of_memory(error):
        remedy = f", with {at_once} at once: lower batch_size (of clip-train: eval.batch_size)" if at_once else ""
        return OutOfMemoryError(f"out of memory{remedy} ({first_line(error)})")
    if isinstance(error, RuntimeError) and _WORKER_KILLED.match(str(error)):
        died = "a loader process has died, as a rule for want of memory: lower data.num_workers"
        return DataError(f"{died} ({first_line(error)})")
    return None
