"""Losses that go wrong on purpose: `loss._target_=tests.training.odd_losses.nan_at_calls +loss.calls=[5]`.

Calls are counted from 1, in each process, over roll-backs too.
"""

import itertools
import os
import signal
import time

import torch
from torch import Tensor

from clip_train.distributed import group_rank
from clip_train.losses import contrastive_loss

_calls = itertools.count(1)


def nan_at_calls(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    calls: list[int],
    rank: int | None = None,
    stuck_at: int | None = None,
    **settings,
) -> Tensor:
    """NaN, with finite gradients, at these calls, and no return from another; on one rank only, if it is given."""
    loss = contrastive_loss(image, text, logit_scale, **settings)
    call = next(_calls)
    if rank not in (None, group_rank()):
        return loss
    if call == stuck_at:
        time.sleep(10_000)
    return loss + float("nan") if call in calls else loss


def nan_gradient_at_calls(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, calls: list[int], rank: int | None = None, **settings
) -> Tensor:
    """A finite loss with a gradient that is NaN in one number, at these calls; on one rank only, if it is given."""
    if next(_calls) in calls and rank in (None, group_rank()):
        image.register_hook(_with_a_nan)
    return contrastive_loss(image, text, logit_scale, **settings)


def signal_at_call(image: Tensor, text: Tensor, logit_scale: Tensor, *, call: int, **settings) -> Tensor:
    """The scheduler's signal comes in this call."""
    if next(_calls) == call:
        os.kill(os.getpid(), signal.SIGUSR1)
    return contrastive_loss(image, text, logit_scale, **settings)


def _with_a_nan(grad: Tensor) -> Tensor:
    first = torch.zeros_like(grad)
    first[0, 0] = float("nan")
    return grad + first
