"""Small real models of every library, with random weights, and the same model under our own config."""

from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from clip_train.data.tokenizer import ClipTokenizer
from clip_train.models import DualEncoder, create_dual_encoder

# A CLIP that OpenAI's code can make too: heads of 64, QuickGELU.
CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "image_size": 32,
    "quick_gelu": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.3, 0.2, 0.25],
    "vision": {
        "name": "vit_base_patch32_clip_224",
        "options": {"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2},
    },
    "text": {"width": 64, "layers": 2, "heads": 1, "context_length": 16},
}
SIGLIP: dict[str, Any] = {
    "embed_dim": 64,
    "image_size": 32,
    "resize_mode": "squash",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "init_logit_bias": -10.0,
    "vision": {
        "name": "vit_base_patch16_siglip_224",
        "options": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
        "proj": "none",
    },
    "text": {
        "name": "siglip",
        "tokenizer": "tokenizer",
        "proj": "none",
        "vocab_size": 99,
        "width": 64,
        "layers": 2,
        "heads": 2,
        "context_length": 12,
    },
}
CAPTIONS = ["a photo of a cat", "It's 2 dogs, running; fast!!", "", "an " + "extremely " * 30 + "long caption"]


def ours(config: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> DualEncoder:
    """A model of ours in evaluation mode, with random weights or these."""
    torch.manual_seed(0)
    model = create_dual_encoder(**config)
    if weights is not None:
        model.load_state_dict(weights)
    else:
        make_random(model)
    return model.eval().requires_grad_(False)


def make_random(model: nn.Module) -> None:
    """Biases and norms start at 0 and 1 in most models, where a slip in the map would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.startswith("logit_"):
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))


def open_clip_clip(custom_text: bool = False) -> Any:
    """open_clip's model of `CLIP`."""
    vision = open_clip.CLIPVisionCfg(image_size=32, patch_size=8, width=128, layers=2, head_width=64)
    text = open_clip.CLIPTextCfg(context_length=16, width=64, heads=1, layers=2)
    torch.manual_seed(0)
    model_class = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = model_class(embed_dim=32, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    make_random(model)
    return model.eval().requires_grad_(False)


def pixels(size: int = 32) -> Tensor:
    """Normalised."""
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def clip_ids(context_length: int = 16) -> Tensor:
    return torch.from_numpy(ClipTokenizer(context_length)(CAPTIONS))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype, name
        assert torch.equal(found[name], weight), name
