"""One number that is not finite, in one rank's part of the gradient, makes the step do nothing on all ranks."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from clip_train.distributed import group_rank
from clip_train.training.optim.bad_step import clip_or_skip, telling_seed
from tests.ranks import pool_group


def three_steps(sharding: str, what: str) -> tuple[list[bool], list[float]]:
    """Of three steps, the second bad on one rank: whether each changed anything here, and the norms."""
    torch.manual_seed(0)
    group = pool_group(2)
    assert group is not None
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    trained: nn.Module = model
    if sharding == "fsdp":
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    else:
        trained = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    changed, norms = [], []
    for step in range(3):
        bad = step == 1 and group_rank(group) == 1
        features = trained(torch.randn(4, 6))
        if bad and what == "gradient":
            features.register_hook(_with_infinity)
        loss = features.square().mean() + (float("nan") if bad and what == "loss" else 0)
        loss.backward(gradient=telling_seed(loss))
        before = _state(model, optimizer)
        norms.append(clip_or_skip(optimizer, model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        changed.append(any(not torch.equal(old, new) for old, new in zip(before, _state(model, optimizer))))
    return changed, norms


def _with_infinity(grad: torch.Tensor) -> torch.Tensor:
    grad = grad.clone()
    grad[0, 0] = float("inf")
    return grad


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [*model.parameters(), *moments]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_bad_step_on_one_rank_changes_none(pool, sharding, what):
    (changed, norms), (other_changed, other_norms) = pool.run(three_steps, sharding, what, ranks=2)
    assert changed == other_changed == [True, False, True]
    assert norms[::2] == other_norms[::2]
    assert not torch.tensor([norms[1], other_norms[1]]).isfinite().any()


class Dispatched(TorchDispatchMode):
    """Names of the operators that are called, and which of them go through DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []
        self.of_shards: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func.overloadpacket.__name__)
        if DTensor in types:
            self.of_shards.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def clipped(limit: float) -> tuple[float, list[bool], list[Dispatched]]:
    """The norm of gradients in shards and whole ones; which are the same clipped by ours and by torch; the calls."""
    group = pool_group(2)
    assert group is not None
    results, modes = [], []
    for ours in (True, False):
        torch.manual_seed(group_rank(group))
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
        model(torch.randn(4, 6)).square().mean().backward()
        torch.manual_seed(0)
        beside = [nn.Parameter(torch.randn((), dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
        for parameter in beside:
            parameter.grad = torch.randn_like(parameter)
        parameters = [*model.parameters(), *beside]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        mode = Dispatched()
        if ours:
            with mode:
                norm = clip_or_skip(optimizer, parameters, limit)
        else:
            norm = clip_or_skip(optimizer, parameters, None)
            with mode:
                nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        results.append([norm, *((g.to_local() if isinstance(g, DTensor) else g) for g in grads)])
        modes.append(mode)
    return norm.item(), [torch.equal(one, other) for one, other in zip(*results, strict=True)], modes


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_shards_are_clipped_as_plain_tensors_to_the_bit_as_by_torch(pool, limit):
    for norm, same, (ours, torchs) in pool.run(clipped, limit, ranks=2):
        assert 0.5 < norm < 1e6 and same == [True] * 7
        assert ours.called.count("_foreach_mul_") == 2 and ours.of_shards == []  # one for each type
        assert "_foreach_mul_" in torchs.of_shards
