"""Losses that go wrong on purpose: `loss._target_=tests.training.odd_losses.nan_at_calls +loss.calls=[5]`.

Calls are counted from 1, in each process, over roll-backs too.
"""

import itertools
import time

import torch
from torch import Tensor

from clip_train.distributed import group_rank
from clip_train.losses import contrastive_loss

_calls = itertools.count(1)


def _is_due(calls: list[int], rank: int | None) -> bool:
    return next(_calls) in calls and rank in (None, group_rank())


def nan_at_calls(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, calls: list[int], rank: int | None = None, **settings
) -> Tensor:
    """NaN, with finite gradients, at these calls; on one rank only, if it is given."""
    loss = contrastive_loss(image, text, logit_scale, **settings)
    return loss + float("nan") if _is_due(calls, rank) else loss


def nan_gradient_at_calls(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, calls: list[int], rank: int | None = None, **settings
) -> Tensor:
    """A finite loss with a gradient that is NaN in one number, at these calls; on one rank only, if it is given."""
    if _is_due(calls, rank):
        image.register_hook(_with_a_nan)
    return contrastive_loss(image, text, logit_scale, **settings)


def _with_a_nan(grad: Tensor) -> Tensor:
    first = torch.zeros_like(grad)
    first[0, 0] = float("nan")
    return grad + first


def stuck_at_call(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, call: int, rank: int | None = None, **settings
) -> Tensor:
    """Does not return from this call."""
    if _is_due([call], rank):
        time.sleep(10_000)
    return contrastive_loss(image, text, logit_scale, **settings)
