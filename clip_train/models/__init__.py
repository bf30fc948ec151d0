"""Dual encoders: a timm vision tower and a transformers text tower with a common embedding."""

from clip_train.models.dual_encoder import DualEncoder, create_dual_encoder

__all__ = ["DualEncoder", "create_dual_encoder"]
