"""The cached step under DDP and FSDP2: the plain step's gradients, synchronised once."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from clip_train.distributed import group_rank, group_size
from clip_train.training.cached_gradients import cached_backward
from tests.models.test_dual_encoder import random_batch
from tests.ranks import RankPool
from tests.training.test_cached_gradients import BATCH, LOSSES, plain, tiny_model

MICRO_BATCH = 2


def own_inputs() -> tuple[Tensor, ...]:
    b = BATCH // group_size()
    return tuple(x[group_rank() * b : (group_rank() + 1) * b] for x in random_batch(BATCH))


def under_ddp(loss: str, micro_batch_size: int) -> tuple[float, dict[str, Tensor], list[int]]:
    """Loss, gradients, and how many numbers each synchronisation carried."""
    model = tiny_model(loss)
    ddp = DistributedDataParallel(model)
    sent: list[int] = []

    def count(state: None, bucket: dist.GradBucket):
        sent.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)  # pyright: ignore[reportArgumentType]

    ddp.register_comm_hook(None, count)

    def backward(scalar: Tensor, last: bool) -> None:
        if last:
            ddp.reducer.prepare_for_backward([])  # as Lightning does before a backward that synchronises
        scalar.backward()

    value = cached_backward(
        model,  # not through DDP's forward, which would prepare for a synchronisation of each micro-batch
        LOSSES[loss],
        model.logit_parameters(),
        own_inputs(),
        micro_batch_size=micro_batch_size,
        backward=backward,
    )
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sent


def under_fsdp(loss: str, micro_batch_size: int) -> tuple[float, dict[str, Tensor], list[int]]:
    """Likewise under FSDP2, and how many reduce-scatters each backward had that had any."""
    model = tiny_model(loss)
    shards: list[FSDPModule] = []
    blocks = [
        *model.vision.trunk.get_submodule("blocks").children(),
        *model.text.trunk.get_submodule("encoder.layers").children(),
    ]
    for module in (*blocks, model.vision, model.text):
        shards.append(fully_shard(module))  # the temperature stays outside: FSDP2 shards no scalars
    sent: list[int] = []

    def backward(scalar: Tensor, last: bool) -> None:
        for shard in shards:
            shard.set_requires_gradient_sync(last)
        with CommDebugMode() as collectives:
            scalar.backward()
        sent.append(collectives.get_comm_counts()[torch.ops.c10d._reduce_scatter_base_])

    value = cached_backward(
        model,
        LOSSES[loss],
        model.logit_parameters(),
        own_inputs(),
        micro_batch_size=micro_batch_size,
        backward=backward,
    )
    grads = {name: whole_grad(p) for name, p in model.named_parameters() if p.grad is not None}
    return value.item(), grads, [count for count in sent if count]


def whole_grad(parameter: nn.Parameter) -> Tensor:
    """All of a gradient, averaged over ranks."""
    grad = parameter.grad
    assert grad is not None
    if isinstance(grad, DTensor):
        return grad.full_tensor()
    mean = grad.clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


@pytest.fixture(scope="module")
def two_ranks():
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("step", [under_ddp, under_fsdp])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_gradients_equal_those_of_one_process_and_are_synchronised_once(two_ranks, step: Callable, loss: str):
    expected_value, expected = plain(tiny_model(loss), LOSSES[loss])
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    local_batch = BATCH // 2
    whole, cached = (two_ranks.run(step, loss, size) for size in (local_batch, MICRO_BATCH))
    for value, found, sent in (*whole, *cached):
        assert value == pytest.approx(expected_value.item(), rel=1e-6)
        assert sorted(sent) == sorted(whole[0][2]) and sent
        for name, grad in expected.items():
            assert (found[name] - grad).norm() <= 1e-6 * grad.norm() + 1e-7 * total, name
