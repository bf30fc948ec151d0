"""What a rank holds from step to step: weights, gradients, the optimizer's state, an average of the weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clip_train.distributed import gathers_rounded
from clip_train.models import DualEncoder
from clip_train.models.layers import product_weights, repeated_blocks
from clip_train.models.locking import fixed_names
from clip_train.training.frozen_towers import frozen_towers
from clip_train.training.optim.optimizer import parameter_groups

_TOWERS = ("vision", "text", "decoder")


@dataclass(frozen=True)
class States:
    """Bytes of all ranks together, which a sharding strategy divides.

    Attributes:
        weights: parameters and buffers.
        gradients: of what learns.
        optimizer: its state after the first step.
        average: of `ema.decay`; 0 without.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float


def count_states(model: nn.Module, optim: Mapping[str, Any], averaged: bool = False) -> States:
    """Of a model and the `optim` group.

    Args:
        averaged: whether `ema.decay` is set.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors = [*model.parameters(), *model.buffers()]
    return States(_bytes(tensors), _bytes(learning), optimizer_bytes(model, optim), _average(model) if averaged else 0)


def optimizer_bytes(model: nn.Module, optim: Mapping[str, Any]) -> float:
    """Of the optimizer's state, in each parameter's own dtype or as `optim.state` says; counters left out."""
    groups = parameter_groups(model, optim)
    number = _STATE_BYTES.get(optim.get("state", "fp32"), Tensor.element_size)
    return float(sum(_copies(optim, g) * sum(p.numel() * number(p) for _, p in g["params"]) for g in groups))


def _bytes_in_8bit(parameter: Tensor) -> float:
    """Of a number of a moment: a byte, and the scale of its block, unless the parameter is small or does not divide."""
    quantized = parameter.numel() >= 4096 and parameter.numel() % _BLOCK == 0
    return 1 + 4 / _BLOCK + 1024 / parameter.numel() if quantized else parameter.element_size()


_BLOCK = 256
_STATE_BYTES: Mapping[str, Callable[[Tensor], float]] = {"bf16": lambda _: 2, "8bit": _bytes_in_8bit}


def _copies(optim: Mapping[str, Any], group: Mapping[str, Any]) -> int:
    """How many numbers the optimizer keeps for each one that learns."""
    match optim.get("name", "adamw"):
        case "lion":
            return 1
        case "sgd":
            return 1 if optim.get("momentum") else 0
        case "muon":
            return 2 if group.get("use_fallback") else 1  # the fallback is AdamW
        case "adamw":
            return 3 if optim.get("amsgrad") else 2
    return 2


def _average(model: nn.Module) -> float:
    """In fp32, of what training changes."""
    fixed = fixed_names(model)
    kept = model.state_dict(keep_vars=True)
    return 4.0 * sum(t.numel() for name, t in kept.items() if t.is_floating_point() and name not in fixed)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class ShardedUnit:
    """What FSDP2 gathers and cuts at once: a block, or what is left of a tower.

    Attributes:
        parameters: that it holds itself, not those of units inside.
        sizes: bytes of a number of each, when it is gathered.
        is_tower: it stays gathered from forward to backward if it learns; a block does not.
        encoded_once: a step calls it once for each micro-batch, as nothing in its tower learns.
    """

    parameters: list[Tensor]
    sizes: list[int]
    is_tower: bool
    encoded_once: bool = False

    def gathered_bytes(self, world_size: int) -> float:
        """Of all ranks' parts, which are equal: the first axis is padded to a multiple of the ranks."""
        return sum(size * _padded(p, world_size) for p, size in zip(self.parameters, self.sizes, strict=True))

    def kept_bytes(self, world_size: int) -> float:
        """The same as they are kept."""
        return sum(p.element_size() * _padded(p, world_size) for p in self.parameters)

    def reduced_bytes(self, world_size: int) -> float:
        """The same of the gradients of what learns, in the dtype of what is kept."""
        return sum(p.element_size() * _padded(p, world_size) for p in self.parameters if p.requires_grad)

    @property
    def learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters)


def sharded_units(model: DualEncoder, precision: str = "32") -> list[ShardedUnit]:
    """As `training/fsdp.py` cuts the model, and rounds what it gathers with `trainer.precision=bf16-mixed`.

    The model is in training mode afterwards.
    """
    rounded = product_weights(model) if precision == "bf16-mixed" and gathers_rounded() else set()
    once = frozen_towers(model.train())
    units: list[ShardedUnit] = []
    for tower in (part for name, part in model.named_children() if name in _TOWERS):
        taken: set[int] = set()
        for module in (*repeated_blocks(tower), tower):  # inner ones first
            own = [parameter for parameter in module.parameters() if id(parameter) not in taken]
            taken |= {id(parameter) for parameter in own}
            if own:
                sizes = [2 if parameter in rounded else parameter.element_size() for parameter in own]
                is_tower = module is tower  # whose own weights are gathered before it is known to be done already
                encoded_once = tower in once and not is_tower
                units.append(ShardedUnit(list[Tensor](own), sizes, is_tower, encoded_once))
    return units


def beside_towers(model: DualEncoder) -> list[Tensor]:
    """Parameters that stay whole on every rank: the logit scale and bias, and adapters."""
    inside = {id(parameter) for unit in sharded_units(model) for parameter in unit.parameters}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


def _padded(parameter: Tensor, world_size: int) -> int:
    """Numbers of all ranks' parts."""
    rows = parameter.shape[0] if parameter.ndim else 1
    per_row = parameter.numel() // max(rows, 1)
    return -(-rows // world_size) * world_size * per_row


def dtype_bytes(name: str | None) -> int:
    """Of a number of `loss.matmul_dtype`; fp32 if None."""
    return 4 if name is None else getattr(torch, name).itemsize
