"""AdamW whose moments are kept in 8 bits (Dettmers et al., 2022, arXiv:2110.02861), by torchao: the extra `torchao`."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torchao.optim
from torch import Tensor
from torchao.optim.subclass_8bit import OptimState8bit

_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class AdamW8bit(torchao.optim.AdamW8bit):
    """torchao's, with a state dict of plain tensors, as checkpoints hold them.

    Moments of small tensors, and of those that blocks of 256 do not divide, stay in fp32.

    Args:
        params, lr, betas, eps, weight_decay: as of torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)  # pyright: ignore[reportArgumentType]

    def state_dict(self) -> dict[str, Any]:
        """With the codes and the scales of each quantized moment in place of it."""
        found = super().state_dict()
        return {**found, "state": {number: _plain(values) for number, values in found["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` returned."""
        states = {number: _quantized(values) for number, values in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": states})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, OptimState8bit):
            plain |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale}
        else:
            plain[name] = value
    return plain


def _quantized(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in values.items() if "." not in name}
    for name, signed in _SIGNED.items():
        if f"{name}.codes" in values:
            found[name] = _moment(values[f"{name}.codes"], values[f"{name}.scale"], signed)
    return found


def _moment(codes: Tensor, scale: Tensor, signed: bool) -> OptimState8bit:
    zeros = OptimState8bit.zeros((1,), signed, block_size=1, device=codes.device)  # with the values of the codes
    return OptimState8bit(codes, scale, zeros.qmap, signed, torch.float32)
