"""AdamW with decay on matrices only."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def build_adamw(
    model: nn.Module, *, lr: float, weight_decay: float, betas: Sequence[float], eps: float, fused: bool
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters.

    No decay on what is a vector or a number once axes of size 1 are dropped: biases, gains of norms, class tokens,
    `logit_scale`. That is open_clip's rule. Numbers have a group of their own: where the rest is sharded they are not,
    and a fused optimizer takes no mixture.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if _is_matrix(parameter)]
    vectors = [parameter for parameter in trainable if not _is_matrix(parameter) and parameter.ndim]
    numbers = [parameter for parameter in trainable if not parameter.ndim]
    decays = ((matrices, weight_decay), (vectors, 0.0), (numbers, 0.0))
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays if parameters]
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


def keep_settings(optimizer: torch.optim.Optimizer, optim: Mapping[str, Any]) -> None:
    """Give the optimizer of `build_adamw` the settings of a config, but for the rate, which changes with each step."""
    for group in optimizer.param_groups:
        weight_decay = optim["weight_decay"] if _is_matrix(group["params"][0]) else 0.0
        group |= {"betas": tuple(optim["betas"]), "eps": optim["eps"], "weight_decay": weight_decay}


def _is_matrix(parameter: nn.Parameter) -> bool:
    return sum(size > 1 for size in parameter.shape) >= 2
