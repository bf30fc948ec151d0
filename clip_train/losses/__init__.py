"""Losses over the batches of all ranks, as pure functions."""

from clip_train.losses.captioning import CaptioningLoss
from clip_train.losses.contrastive import contrastive_loss
from clip_train.losses.distillation import distillation_loss
from clip_train.losses.exchange import UnequalBatchesError
from clip_train.losses.sigmoid import sigmoid_loss

__all__ = ["CaptioningLoss", "UnequalBatchesError", "contrastive_loss", "distillation_loss", "sigmoid_loss"]
