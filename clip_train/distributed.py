"""The process group, for code that must also run without one."""

from datetime import timedelta
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from clip_train.errors import DataError

T = TypeVar("T")


def group_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in the group; 1 where there is no process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def group_rank(group: dist.ProcessGroup | None = None) -> int:
    """This rank in the group; 0 where there is no process group."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


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


def gather_ragged(local: Tensor, sizes: list[int]) -> Tensor:
    """Concatenate rows of all ranks, in rank order, where rank r has `sizes[r]` of them. No gradients."""
    if len(sizes) == 1:
        return local
    largest = max(sizes)
    padded = local.new_zeros(largest, *local.shape[1:])
    padded[: len(local)] = local
    gathered = local.new_empty(len(sizes), *padded.shape)
    dist.all_gather_into_tensor(gathered.view(-1, *padded.shape[1:]), padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes)])


def sum_over_ranks(local: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over ranks, on every rank, in place. No gradients."""
    if group_size(group) > 1:
        dist.all_reduce(local, group=group)
    return local


def gather_objects(local: list[T], group: dist.ProcessGroup | None = None) -> list[T]:
    """The entries of all ranks' lists, in rank order."""
    if group_size(group) == 1:
        return local
    gathered: list[list[T]] = [[] for _ in range(group_size(group))]
    dist.all_gather_object(gathered, local, group=group)
    return [entry for part in gathered for entry in part]


def raise_everywhere(error: str) -> None:
    """Raise on all ranks if any rank has an error, so that none waits for one that is gone.

    Raises:
        DataError: with the first rank's message.
    """
    if errors := gather_objects([error] if error else []):
        raise DataError(errors[0])
