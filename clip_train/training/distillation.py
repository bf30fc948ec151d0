"""The `distill` group of the configs: a larger, trained model that the one in training learns from."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from clip_train.errors import ConfigError
from clip_train.interop.model_source import open_model
from clip_train.losses import distillation_loss
from clip_train.models import DualEncoder
from clip_train.models.text_config import TextConfig
from clip_train.models.text_lengths import TokenIds

Loss = Callable[..., Tensor]


class Teacher:
    """A trained model, frozen and in evaluation mode.

    No module, so that whatever holds one has no part of it in its checkpoints, its optimizer, or what ranks exchange.

    Args:
        model: of any width, for the same pictures and token ids as the student.
        loss_weight: of the distillation loss, beside the student's own.
        matmul_dtype: as of `contrastive_loss`.
        same_lengths: its text tower is of the kind of the student's, and so reads as many tokens of a text.

    Attributes:
        metrics: `train/distillation_loss` of the last step, on the device.
    """

    def __init__(
        self,
        model: DualEncoder,
        loss_weight: float,
        matmul_dtype: torch.dtype | None,
        same_lengths: bool,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.loss_weight, self.matmul_dtype, self.same_lengths = loss_weight, matmul_dtype, same_lengths
        self.metrics: dict[str, Tensor] = {}

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.model.to(device)

    def add_to(self, loss: Loss, batch: Mapping[str, Any], micro_batch_size: int | None) -> Loss:
        """The loss of a step with the student's distance from the teacher added; the batch is encoded once, now.

        Args:
            loss: of the student's features, images' and texts' first, and of its logit parameters.
            batch: of this rank.
            micro_batch_size: pairs to encode at once; None for all.
        """
        image, text = self._encode(batch["image"], batch["text"], micro_batch_size or len(batch["image"]))
        scale = self.model.logit_scale.exp()

        def with_teacher(*features: Tensor, logit_scale: Tensor, **others: Tensor) -> Tensor:
            distance = distillation_loss(
                features[0], features[1], logit_scale, image, text, scale, matmul_dtype=self.matmul_dtype
            )
            self.metrics = {"train/distillation_loss": distance.detach()}
            return loss(*features, logit_scale=logit_scale, **others) + self.loss_weight * distance

        return with_teacher

    @torch.no_grad()
    def _encode(self, images: Tensor, texts: Tensor | TokenIds, at_once: int) -> tuple[Tensor, Tensor]:
        parts = [slice(start, start + at_once) for start in range(0, len(images), at_once)]
        if isinstance(texts, TokenIds) and not self.same_lengths:
            texts = texts.ids
        image = [self.model.encode_image(images[part]) for part in parts]
        text = [self.model.encode_text(texts[part]) for part in parts]
        return torch.cat(image), torch.cat(text)


def open_teacher(
    distill: Mapping[str, Any], student: Mapping[str, Any], matmul_dtype: torch.dtype | None = None
) -> Teacher:
    """The teacher of the `distill` group.

    Args:
        distill: the group, with a `model` config, or None there if the weights are a checkpoint of ours.
        student: the `model` config of the run.
        matmul_dtype: as of `contrastive_loss`.

    Raises:
        ConfigError: the weights cannot be read or do not fit, or the teacher takes other pictures or tokens.
    """
    try:
        source = open_model(str(distill["weights"]), distill.get("model"))
    except ConfigError as error:
        raise ConfigError(f"distill: {error}") from error
    ours, theirs = _inputs(student), _inputs(source.config)
    for key, value in ours.items():
        if value != theirs[key]:
            raise ConfigError(
                f"distill: the teacher's {key} is {theirs[key]}, the student's {value}: both are given the same"
                " pictures and tokens; take another teacher, or its setting for the student"
            )
    same_lengths = TextConfig.of(student["text"]).name == TextConfig.of(source.config["text"]).name
    return Teacher(source.model, distill["loss_weight"], matmul_dtype, same_lengths)


def _inputs(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is given, by its config."""
    text = TextConfig.of(model["text"])
    return {
        "model.image_size": model["image_size"],
        "model.text.tokenizer": text.tokenizer_name,
        "model.text.clean": text.clean,
        "model.text.context_length": text.context_length,
    }
