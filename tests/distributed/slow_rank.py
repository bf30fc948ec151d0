"""The contrastive loss on ranks of which the last is slow: `loss._target_=tests.distributed.slow_rank.slow_loss`."""

import time

from torch import Tensor

from clip_train.distributed import group_rank, group_size
from clip_train.losses import contrastive_loss


def slow_loss(*features: Tensor, seconds: float, **settings) -> Tensor:
    """The others wait for it in the loss."""
    _wait(seconds)
    return contrastive_loss(*features, **settings)


def slow_backward(image: Tensor, text: Tensor, *, seconds: float, **settings) -> Tensor:
    """The others wait for it when gradients are exchanged, as the loss's own backward is behind it."""
    image.register_hook(lambda _: _wait(seconds))
    return contrastive_loss(image, text, **settings)


def _wait(seconds: float) -> None:
    if group_rank() == group_size() - 1:
        time.sleep(seconds)
