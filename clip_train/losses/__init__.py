"""Contrastive losses over the batches of all ranks, as pure functions."""

from clip_train.losses.contrastive import contrastive_loss

__all__ = ["contrastive_loss"]
