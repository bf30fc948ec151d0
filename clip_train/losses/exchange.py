"""What passes between the ranks of a loss: one side's features, the gradients back to it, and a few sums."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from clip_train.distributed import exchanging, group_rank, group_size, host_group
from clip_train.errors import ClipTrainError

EXCHANGES = ("gather", "ring")


class UnequalBatchesError(ClipTrainError, ValueError):
    """The ranks came to the loss with differently shaped features."""


def check_features(image: Tensor, text: Tensor, exchange: str, group: dist.ProcessGroup | None) -> None:
    """Check the inputs of a loss, on all ranks alike.

    The ranks agree through the host, so that an accelerator is not waited for, unless a group has no gloo side.

    Raises:
        UnequalBatchesError: on every rank, unless all have equally many image and text rows, of one width.
        ValueError: there is no such exchange.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange} is none of {', '.join(EXCHANGES)}")
    are_pairs = image.ndim == 2 and image.shape == text.shape and len(image) > 0
    shapes = list(image.shape) if are_pairs else [0, 0]  # told to the others before raising, as they would wait
    extremes = torch.tensor([*shapes, *(-size for size in shapes)])
    if group_size(group) > 1:
        host = host_group(group)
        extremes = extremes if host else extremes.to(image.device)
        with exchanging():
            dist.all_reduce(extremes, dist.ReduceOp.MAX, group=host or group)
    if not are_pairs:
        raise UnequalBatchesError(
            f"image features {tuple(image.shape)} and text features {tuple(text.shape)} are no pairs:"
            " give both as (pairs, dim), equally many and at least one"
        )
    most, least = extremes[:2].tolist(), (-extremes[2:]).tolist()
    if most != least:
        raise UnequalBatchesError(
            f"the ranks have between {tuple(least)} and {tuple(most)} features, this one {tuple(shapes)}:"
            " give every rank equally many pairs"
        )


def mean_over_ranks(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean over ranks, on every rank. No gradients."""
    if (world_size := group_size(group)) == 1:
        return local
    total = local.clone()
    with exchanging():
        dist.all_reduce(total, group=group)
    return total / world_size


def maximum_over_ranks_(values: Tensor, group: dist.ProcessGroup | None) -> None:
    """The greatest over ranks of each value, in place. No gradients."""
    if group_size(group) > 1:
        with exchanging():
            dist.all_reduce(values, dist.ReduceOp.MAX, group=group)


class GatheredRows:
    """All ranks' rows (B, D), on their way from the moment this is made.

    Attributes:
        own: the slice of this rank's rows.
    """

    def __init__(self, local: Tensor, group: dist.ProcessGroup | None) -> None:
        world_size, rank = group_size(group), group_rank(group)
        self.own = slice(rank * len(local), (rank + 1) * len(local))
        self._work = None
        self._rows = local
        if world_size > 1:
            self._rows = local.new_empty(world_size * len(local), *local.shape[1:])
            self._work = dist.all_gather_into_tensor(self._rows, local, group=group, async_op=True)

    def wait(self) -> Tensor:
        if self._work is not None:
            with exchanging():
                self._work.wait()
            self._work = None
        return self._rows

    @property
    def others(self) -> list[slice]:
        """The slices before and after this rank's own."""
        before, after = slice(0, self.own.start), slice(self.own.stop, len(self._rows))
        return [part for part in (before, after) if part.start < part.stop]


class ReduceScatter:
    """Sums of gradients (W, n, D) going home, each rank's (n, D) into its `home`, from the moment this is made."""

    def __init__(self, grads: Tensor, home: Tensor, group: dist.ProcessGroup | None) -> None:
        self._grads = grads  # kept alive until sent
        self._work = dist.reduce_scatter_tensor(home, grads.flatten(0, 1), group=group, async_op=True)

    def wait(self) -> None:
        if self._work is not None:
            with exchanging():
                self._work.wait()


class Shift:
    """Tensors on their way to the next rank of the ring; `wait` returns those of the previous one."""

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        world_size, rank = group_size(group), group_rank(group)
        self._sent = self._received = list(tensors)
        self._works = []
        if world_size > 1 and tensors:
            self._received = [torch.empty_like(tensor) for tensor in tensors]
            to, source = (rank + 1) % world_size, (rank - 1) % world_size
            sends = [dist.P2POp(dist.isend, t, group=group, group_peer=to) for t in self._sent]
            receives = [dist.P2POp(dist.irecv, t, group=group, group_peer=source) for t in self._received]
            self._works = dist.batch_isend_irecv([*sends, *receives])

    def wait(self) -> list[Tensor]:
        with exchanging():
            for work in self._works:
                work.wait()
        return self._received


def ring_blocks(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> Iterator[list[Tensor]]:
    """Every rank's tensors in turn: this rank's, the previous one's, and so on; the next come while one is used."""
    block = list(tensors)
    for left in reversed(range(group_size(group))):
        coming = Shift(block, group) if left else None
        yield block
        if coming is not None:
            block = coming.wait()


def around_ring(
    tensors: Sequence[Tensor],
    contribute: Callable[..., list[Tensor]],
    merge_: Callable[[list[Tensor], list[Tensor]], None],
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """What all ranks contribute to this rank's tensors.

    The tensors go around the ring. `contribute(step, *block)` is called for each rank's block, this rank's own at step
    0; what it returns is merged, by `merge_(own, others)` into the former, with what earlier ranks contributed to that
    block, and follows it home. A contribution travels while the next one is computed.
    """
    carried = None
    for step, block in enumerate(ring_blocks(tensors, group)):
        contribution = contribute(step, *block)
        if carried is not None:
            merge_(contribution, carried.wait())
        carried = Shift(contribution, group)
    return carried.wait() if carried is not None else []


def add_(own: list[Tensor], others: list[Tensor]) -> None:
    """Merge gradients, for `around_ring`."""
    for mine, theirs in zip(own, others, strict=True):
        mine.add_(theirs)
