"""Compiled blocks on two ranks, under DDP and in shards, have the gradients of one process that compiles nothing."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from clip_train.distributed import group_rank, group_size
from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder
from clip_train.models.compiling import compile_blocks
from clip_train.training.fsdp import shard_towers
from tests.models.test_dual_encoder import TINY, random_batch
from tests.ranks import pool_group

BATCH = 12


def step(ranks: int, strategy: str) -> tuple[float, dict[str, Tensor], list[int]]:
    """Loss, gradients, and the graphs there were after each of two steps."""
    torch.manual_seed(0)
    model = create_dual_encoder(**TINY, grad_checkpointing=True)
    group = pool_group(ranks)
    rank, world_size = group_rank(group), group_size(group)
    inputs = tuple(x[rank * BATCH // world_size : (rank + 1) * BATCH // world_size] for x in random_batch(BATCH))
    torch._dynamo.reset()
    counters.clear()
    wrapped = model
    if strategy != "one":
        compile_blocks(model, backend="aot_eager")
    if strategy == "ddp":
        wrapped = DistributedDataParallel(model, process_group=group)
    if strategy == "fsdp":
        assert group is not None
        shard_towers(model, DeviceMesh.from_group(group, "cpu"))
    graphs = []
    for _ in range(2):
        model.zero_grad()
        image, text = wrapped(*inputs)
        loss = contrastive_loss(image, text, model.logit_scale.exp(), group=group)
        loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    found = {
        name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
        for name, p in model.named_parameters()
        if p.grad is not None and name != "logit_scale"  # which the strategy averages
    }
    return loss.item(), found, graphs


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(pool, strategy):
    loss, expected, _ = step(1, "one")
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for rank_loss, found, graphs in pool.run(step, 2, strategy, ranks=2):
        assert rank_loss == pytest.approx(loss, rel=1e-5)
        assert graphs == [2, 2]  # one for each tower
        assert found.keys() == expected.keys()
        for name, reference in expected.items():
            assert (found[name] - reference).norm() <= 2e-5 * reference.norm() + 1e-7 * total, name
