"""AdamW with decay on matrices only."""

from collections.abc import Sequence

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
