"""What a step holds besides weights and optimizer state: the tensors of a forward and backward, while they live."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clip_train.planning.towers import OTHER, PlannedModel


@dataclass(frozen=True)
class Footprint:
    """Bytes of one forward and backward of so many pairs.

    Attributes:
        saved: what each part of the model keeps for backward.
        peak: the most that is there at once, gradients of parameters left out.
        peak_with_gradients: the same with those that are there by then.
    """

    pairs: int
    saved: dict[str, float]
    peak: float
    peak_with_gradients: float

    @property
    def saved_total(self) -> float:
        """Of all parts."""
        return sum(self.saved.values())


@dataclass(frozen=True)
class Activations:
    """Footprints of two batches, and so of any: what is per pair, and what is not, such as weights cast to bf16."""

    small: Footprint
    large: Footprint

    def at(self, pairs: int) -> Footprint:
        """Of another number of pairs."""
        share = (pairs - self.small.pairs) / (self.large.pairs - self.small.pairs)

        def between(low: float, high: float) -> float:
            return max(low + share * (high - low), 0.0)

        saved = {name: between(low, self.large.saved[name]) for name, low in self.small.saved.items()}
        peaks = [between(getattr(self.small, key), getattr(self.large, key)) for key in ("peak", "peak_with_gradients")]
        return Footprint(pairs, saved, *peaks)


def measure_activations(planned: PlannedModel, pairs: int) -> Activations:
    """Exact at `pairs`, and on a straight line through half of that at others."""
    large = max(pairs, 4)
    return Activations(measure_footprint(planned, large // 2), measure_footprint(planned, large))


def measure_footprint(planned: PlannedModel, pairs: int) -> Footprint:
    """Run a step on tensors without memory, and note what they would take."""
    model = planned.model.train()
    with planned.fake():
        inputs = planned.inputs(pairs)
        with _Living() as living, living.telling_parts(planned.parts), living.telling_gradients(model):
            with planned.autocast():
                outputs = model(*inputs)
                saved = Counter(living.by_part)
                planned.backward(outputs)
            del outputs
    for parameter in model.parameters():
        parameter.grad = None
    parts = {name: float(saved[name]) for name in (*planned.parts, OTHER)}
    return Footprint(pairs, parts, float(living.peak), float(living.peak_with_gradients))


class _Living(TorchDispatchMode):
    """Bytes of the storages that were made in a `with` block and are still there.

    Attributes:
        by_part: without gradients, by the part of the model that made them.
        gradients: of parameters.
        peak, peak_with_gradients: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_part: Counter[str] = Counter()
        self.gradients = self.peak = self.peak_with_gradients = 0
        self._part = OTHER
        self._known: dict[int, tuple[int, str | None]] = {}  # bytes, and the part if it is no gradient

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in taken:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:
            return
        self._known[id(storage)] = storage.nbytes(), self._part
        self.by_part[self._part] += storage.nbytes()
        weakref.finalize(storage, self._remove, id(storage))
        self._note_peaks()

    def _remove(self, key: int) -> None:
        size, part = self._known.pop(key)
        if part is None:
            self.gradients -= size
        else:
            self.by_part[part] -= size

    def _is_gradient(self, parameter: Tensor) -> None:
        """What was made as any other tensor is a gradient from now on."""
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if key in self._known and (part := self._known[key][1]) is not None:
            size = self._known[key][0]
            self._known[key] = size, None
            self.by_part[part] -= size
            self.gradients += size

    def _note_peaks(self) -> None:
        living = sum(self.by_part.values())
        self.peak = max(self.peak, living)
        self.peak_with_gradients = max(self.peak_with_gradients, living + self.gradients)

    @contextmanager
    def telling_gradients(self, model: nn.Module) -> Iterator[None]:
        """Tell parameters' gradients from what they are made of."""
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        hooks = [parameter.register_post_accumulate_grad_hook(self._is_gradient) for parameter in learning]
        yield
        for hook in hooks:
            hook.remove()

    @contextmanager
    def telling_parts(self, parts: dict[str, nn.Module]) -> Iterator[None]:
        """Note which part is at work."""

        def enter(name: str, *_: Any) -> None:
            self._part = name

        hooks = [part.register_forward_pre_hook(partial(enter, name)) for name, part in parts.items()]
        hooks += [part.register_forward_hook(lambda *_: enter(OTHER)) for part in parts.values()]
        yield
        for hook in hooks:
            hook.remove()
