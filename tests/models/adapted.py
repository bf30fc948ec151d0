"""Small models of each family, and the settings of each way to adapt them."""

from typing import Any

import torch
from torch import Tensor

from clip_train.models import DualEncoder, create_dual_encoder
from tests.interop.tiny import CLIP, SIGLIP

LORA: dict[str, Any] = {
    "method": "lora",
    "towers": ["image", "text"],
    "rank": 2,
    "alpha": 4,
    "dropout": 0.0,
    "use_dora": False,
    "target_modules": {"image": None, "text": None},
    "train_logit_scale": False,
}
DORA = {**LORA, "use_dora": True}
ADAPTER: dict[str, Any] = {
    "method": "adapter",
    "towers": ["image", "text"],
    "ratio": 0.2,
    "reduction": 4,
    "train_logit_scale": False,
}
LIT: dict[str, Any] = {
    "method": "lit",
    "lock": "image",
    "unlocked_groups": 0,
    "freeze_bn_stats": True,
    "train_logit_scale": True,
}
_BERT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 1000,
    "pad_token_id": 0,
}


def _with_vision(name: str, options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {**CLIP, "quick_gelu": False, **more, "vision": {"name": name, "options": options or {}}}


EVA = _with_vision("eva02_base_patch16_clip_224", {"embed_dim": 64, "depth": 2, "num_heads": 2})
RESNET = _with_vision("resnet50_clip", {"num_classes": 32}, image_size=64)
FAMILIES: dict[str, dict[str, Any]] = {
    "clip": CLIP,
    "siglip": SIGLIP,
    "eva": EVA,
    "convnext": _with_vision("convnext_atto"),
    "resnet": RESNET,
    "bert": {**CLIP, "text": {"name": "bert", "context_length": 16, "options": _BERT}},
}


def build(family: str, **more: Any) -> DualEncoder:
    """A model of the family with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return create_dual_encoder(**{**FAMILIES[family], **more}).eval()


def batch_for(model: DualEncoder, family: str, pairs: int = 3) -> tuple[Tensor, Tensor]:
    """Pixels and ids that the model takes."""
    generator = torch.Generator().manual_seed(1)
    size, length = FAMILIES[family]["image_size"], FAMILIES[family]["text"]["context_length"]
    pixels = torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8, generator=generator)
    ids = torch.randint(1, model.text.vocab_size - 1, (pairs, length), generator=generator)
    ids[:, -1] = model.text.vocab_size - 1
    return pixels, ids
