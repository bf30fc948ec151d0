"""Towers that stay as they are need to encode a micro-batch only once, though the step encodes it twice."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

Features = dict[tuple[nn.Module, int], Tensor]


def encoding_once(model: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """The model's forward, for one step: what a frozen tower makes of an input is kept for when that comes again.

    Inputs are told apart by where they lie in memory, as the micro-batches of one batch are.
    """
    towers, known = frozen_towers(model), {}

    def encode(*inputs: Tensor) -> tuple[Tensor, ...]:
        with _answered(towers, known.setdefault(inputs[0].data_ptr(), {})):
            return model(*inputs)

    return encode if towers else model


def frozen_towers(model: nn.Module) -> list[nn.Module]:
    """Those without a weight that learns, or a part that is in training mode and might draw random numbers.

    Not a tower into which something that learns is put from outside: a model's `closed_towers` are the others.
    """
    names = getattr(model, "closed_towers", ("vision", "text"))
    towers = [tower for tower in (getattr(model, name, None) for name in names) if tower is not None]
    return [
        tower
        for tower in towers
        if not any(p.requires_grad for p in tower.parameters()) and not any(part.training for part in tower.modules())
    ]


@contextmanager
def _answered(towers: list[nn.Module], features: Features) -> Iterator[None]:
    """Calls of the towers are answered from `features`, or from the towers and noted there, while this lasts."""
    calls: Counter[nn.Module] = Counter()
    for tower in towers:
        tower.forward = partial(_answer, tower, tower.forward, features, calls)
    try:
        yield
    finally:
        for tower in towers:
            del tower.forward


def _answer(tower: nn.Module, forward: Callable, features: Features, calls: Counter, *inputs: Any) -> Any:
    place = tower, calls[tower]
    calls[tower] += 1
    if any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return forward(*inputs)  # what comes before the tower learns
    if place not in features:
        found = forward(*inputs)
        if not isinstance(found, Tensor):
            return found
        features[place] = found
    return features[place]
