"""A model that is to be exported: its weights in place, its config, and what is known of its training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from clip_train.checkpoints.folder import Manifest
from clip_train.errors import ConfigError
from clip_train.interop.joining import WeightSource, from_scratch, read_source
from clip_train.interop.loading import load_weights
from clip_train.models import DualEncoder, create_dual_encoder


@dataclass(frozen=True)
class ModelSource:
    """A model in evaluation mode and in fp32, with its `model` config.

    Attributes:
        name: of the weights it was read from.
        manifest: of the checkpoint, if it was one of ours.
    """

    model: DualEncoder
    config: Mapping[str, Any]
    name: str
    manifest: Manifest | None = field(default=None)

    @property
    def embed_dim(self) -> int:
        return self.config["embed_dim"]

    @property
    def image_size(self) -> int:
        return self.config["image_size"]

    @property
    def vision_name(self) -> str:
        return self.config["vision"]["name"]

    @property
    def image_mean(self) -> list[float]:
        return self.config["image_mean"]

    @property
    def image_std(self) -> list[float]:
        return self.config["image_std"]

    @property
    def resize_mode(self) -> str:
        return self.config.get("resize_mode", "shortest")

    @property
    def interpolation(self) -> str:
        return self.config.get("interpolation", "bicubic")


def open_model(weights: str | WeightSource, config: Mapping[str, Any] | None) -> ModelSource:
    """Read weights in any layout into the model they are of.

    Args:
        weights: where to take them from, or what `read_weights` takes.
        config: the `model` config; None for the one that a checkpoint of ours was trained with.

    Raises:
        ConfigError: the weights cannot be read, do not fit, or their model is not known.
    """
    source = WeightSource.of(weights)
    found, name = read_source(source), f"weights={source.weights}"
    config = config or (found.manifest.about.get("config", {}).get("model") if found.manifest else None)
    if config is None:
        raise ConfigError(f"{name}: of which model? It is no checkpoint of ours; give model=vit_b_32 or so")
    if "logit_bias" in found.tensors and config.get("init_logit_bias") is None:
        config = {**config, "init_logit_bias": 0.0}
    model = create_dual_encoder(**from_scratch(config))
    load_weights(model, found, name)
    return ModelSource(model.eval().requires_grad_(False).to(torch.float32), config, source.weights, found.manifest)
