"""A small training state, as Lightning has it."""

from typing import Any

import torch
from torch import nn


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 12), nn.GELU(), nn.Linear(12, 5, bias=False))


def train_a_little(model: nn.Module) -> torch.optim.Optimizer:
    """Two steps; the same on every rank."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer)
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(2):
        torch.manual_seed(step)
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, samples_seen: int = 64) -> dict[str, Any]:
    return {
        "samples_seen": samples_seen,
        "global_step": 2,
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {"BadSamples": {"broken": 3}},
    }


def make_state(samples_seen: int = 64, seed: int = 0) -> dict[str, Any]:
    model = make_model(seed)
    return state_of(model, train_a_little(model), samples_seen)


def assert_equal(found: Any, expected: Any) -> None:
    """The same values in the same structure, to the bit."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected) or set(found) == set(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected
