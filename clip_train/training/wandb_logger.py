"""Weights & Biases, offline unless the user has configured it."""

import os
from typing import Any

from lightning.pytorch.loggers import WandbLogger


def create_wandb_logger(save_dir: str, **settings: Any) -> WandbLogger:
    """A logger that never asks for a login: without one the run is kept in `save_dir/wandb` for `wandb sync`.

    Args:
        save_dir: the run folder.
        settings: `project`, `name`, `entity`, `tags`.
    """
    if "WANDB_MODE" not in os.environ and not _logged_in():
        os.environ["WANDB_MODE"] = "offline"
    return WandbLogger(save_dir=save_dir, offline=os.environ.get("WANDB_MODE") == "offline", **settings)


def _logged_in() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
