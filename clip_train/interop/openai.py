"""The layout of OpenAI's CLIP: open_clip's names, and three numbers beside the weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from clip_train.interop import open_clip


def from_ours(weights: Mapping[str, Tensor], image_size: int) -> dict[str, Tensor]:
    """Our state dict as OpenAI's; `open_clip.to_ours` is the way back.

    Args:
        weights: of a CLIP vision transformer or ResNet, with a CLIP text tower.
        image_size: side of the input, in pixels.
    """
    context_length, _ = weights["text.trunk.embeddings.position_embedding.weight"].shape
    vocab_size, _ = weights["text.trunk.embeddings.token_embedding.weight"].shape
    numbers = {"input_resolution": image_size, "context_length": context_length, "vocab_size": vocab_size}
    return open_clip.from_ours(weights) | {name: torch.tensor(number) for name, number in numbers.items()}
