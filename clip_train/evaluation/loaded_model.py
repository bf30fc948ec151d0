"""A trained model, ready to encode: weights, tokenizer, device, precision."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from clip_train.data.tokenizer_choice import CaptionTokenizer, choose_tokenizer
from clip_train.errors import ConfigError, DataError
from clip_train.interop.model_source import ModelSource
from clip_train.models import DualEncoder
from clip_train.models.text_config import TextConfig

PRECISIONS = ("32", "bf16")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, and what goes with it.

    Attributes:
        source: the model's config, and where its weights came from.
        tokenizer: captions to what its text tower takes.
        device: of this rank.
        precision: `32`, or `bf16` for products in bfloat16; features and scores are fp32 either way.
        batch_size: pictures or texts per forward pass on a rank.
        num_workers: loader processes per rank.
    """

    source: ModelSource
    tokenizer: CaptionTokenizer
    device: torch.device
    precision: str
    batch_size: int
    num_workers: int

    @property
    def model(self) -> DualEncoder:
        return self.source.model

    def autocast(self) -> AbstractContextManager:
        """The precision to compute in, to be entered once."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def load_model(
    source: ModelSource, device: torch.device, *, precision: str, compile: bool, batch_size: int, num_workers: int
) -> LoadedModel:
    """Put a model on its device.

    Args:
        source: from `open_model`.
        device: where to compute.
        precision: `32` or `bf16`.
        compile: let torch.compile make kernels of the towers, which takes a minute and pays on large sets.
        batch_size: pictures or texts per forward pass on a rank.
        num_workers: loader processes per rank.

    Raises:
        ConfigError: an unknown precision, or a batch size below 1.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision} is none of {', '.join(PRECISIONS)}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is not a whole number of at least 1")
    text = TextConfig.of(source.config["text"])
    tokenizer = choose_tokenizer(text.tokenizer_name, text.context_length, clean=text.clean)
    model = source.model.to(device)
    if precision == "bf16":
        _round_products(model)
    if compile:
        model.vision.compile()
        # Texts come in groups of several lengths, but for towers that read them whole.
        (model.text.trunk if hasattr(model.text, "measure") else model.text).compile(dynamic=True)
    return LoadedModel(source, tokenizer, device, precision, batch_size, num_workers)


def _round_products(model: nn.Module) -> None:
    """Keep in bf16 the matrices that autocast would round for each batch."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.dtype == torch.float32:
            module.weight.data = module.weight.data.bfloat16()
            if module.bias is not None:
                module.bias.data = module.bias.data.bfloat16()


def check_numbers(values: torch.Tensor) -> None:
    """Raises DataError if embeddings, or what was computed of them, are not numbers: for values that all ranks have."""
    if not values.isfinite().all():
        raise DataError(
            "the model's embeddings are not numbers (NaN): its weights are damaged, or training has diverged"
        )
