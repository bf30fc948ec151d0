"""Collectives that autograd sees through."""

import torch
import torch.distributed as dist
from torch import Tensor

from clip_train.distributed import group_size


class _AllGather(torch.autograd.Function):
    """Rows of all ranks. Backward sums what every rank wants of this rank's rows."""

    @staticmethod
    def forward(ctx, local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.rows = group, len(local)
        gathered = local.new_empty(group_size(group) * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        local = grads[0].new_empty(ctx.rows, *grads[0].shape[1:])
        dist.reduce_scatter_tensor(local, grads[0].contiguous(), group=ctx.group)
        return local, None


def all_gather(local: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate the rows (b, ...) of all ranks, in rank order, with gradients to every rank."""
    return _AllGather.apply(local, group) if group_size(group) > 1 else local  # pyright: ignore[reportReturnType]


def mean_over_ranks(local: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The mean over ranks in value; the local one in gradient, as strategies that average gradients expect."""
    if group_size(group) == 1:
        return local
    mean = local.detach().clone()
    dist.all_reduce(mean, group=group)
    return local + (mean / group_size(group) - local.detach())
