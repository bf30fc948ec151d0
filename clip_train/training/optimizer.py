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
    `logit_scale`. That is open_clip's rule.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.squeeze().ndim >= 2]
    others = [parameter for parameter in trainable if parameter.squeeze().ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)


def keep_settings(optimizer: torch.optim.Optimizer, optim: Mapping[str, Any]) -> None:
    """Give the optimizer of `build_adamw` the settings of a config, but for the rate, which changes with each step."""
    matrices, others = optimizer.param_groups
    for group, weight_decay in ((matrices, optim["weight_decay"]), (others, 0.0)):
        group |= {"betas": tuple(optim["betas"]), "eps": optim["eps"], "weight_decay": weight_decay}
