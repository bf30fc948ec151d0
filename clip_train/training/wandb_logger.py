"""Weights & Biases, offline unless the user has configured it."""

import os
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger


def create_wandb_logger(save_dir: str, **settings: Any) -> WandbLogger:
    """A logger that never asks for a login: without one the run is kept in `save_dir/wandb` for `wandb sync`.

    Args:
        save_dir: the run folder.
        settings: `project`, `name`, `entity`, `tags`.
    """
    if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
        settings["mode"] = "offline"
    return WandbLogger(save_dir=save_dir, **settings)
