"""A loss that takes its time, so that a run of a tiny model lasts until something has been done to it."""

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_train.losses.contrastive import contrastive_loss


def slow_contrastive_loss(*args: Any, seconds: float, begun: str | None = None, **kwargs: Any) -> Tensor:
    """The contrastive loss, `seconds` later; leaves a file `begun` at once."""
    if begun:
        Path(begun).touch()
    time.sleep(seconds)
    return contrastive_loss(*args, **kwargs)
