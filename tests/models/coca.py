"""A small CoCa: open_clip's, and the same under our own config."""

from typing import Any

import open_clip
import torch

from clip_train.models import create_dual_encoder
from clip_train.models.captioner import Captioner
from tests.interop.tiny import make_random

COCA: dict[str, Any] = {
    "embed_dim": 64,
    "image_size": 32,
    "vision": {
        "name": "vit_base_patch32_clip_224",
        "options": {"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2},
    },
    "text": {"width": 64, "layers": 2, "heads": 2, "context_length": 16},
    "decoder": {"layers": 2, "heads": 2, "attn_pooler_queries": 9, "attn_pooler_heads": 4},
}


def open_clip_coca() -> Any:
    """open_clip's model of `COCA`."""
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(
        image_size=32,
        patch_size=8,
        width=128,
        layers=2,
        head_width=64,
        attentional_pool=True,
        attn_pooler_queries=9,
        attn_pooler_heads=4,
        output_tokens=True,
    )
    size: dict[str, Any] = {"context_length": 16, "width": 64, "heads": 2, "layers": 2}
    text = open_clip.CLIPTextCfg(**size, embed_cls=True, output_tokens=True)
    model = open_clip.CoCa(64, open_clip.coca_model.MultimodalCfg(**size), text, vision)
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # it leaves it as the memory was
    make_random(model)
    return model.eval().requires_grad_(False)


def our_coca(**changes: Any) -> Captioner:
    """A model of `COCA` with random weights."""
    torch.manual_seed(0)
    model = create_dual_encoder(**{**COCA, **changes})
    assert isinstance(model, Captioner)
    return model
