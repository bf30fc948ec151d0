"""What a model is, read off its modules: sizes and kinds that the configs of other libraries want to know."""

from dataclasses import dataclass
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from clip_train.errors import ConfigError
from clip_train.models.fast_layers import QuickGELU


@dataclass(frozen=True)
class TransformerSize:
    """Of a transformer whose blocks are all alike.

    Attributes:
        width: of the residual stream.
        layers, heads: how many blocks, and heads in each.
        mlp_width: hidden width of the blocks' MLP.
        activation: of the MLP: `gelu`, `quick_gelu` or `gelu_pytorch_tanh`, as transformers calls them.
        norm_eps: what the layer norms add to the variance.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str
    norm_eps: float


@dataclass(frozen=True)
class PatchedImage:
    """What a vision transformer takes: a square of `image_size` pixels in patches of `patch_size`."""

    image_size: int
    patch_size: int


def vision_transformer_size(trunk: VisionTransformer) -> TransformerSize:
    """Raises ConfigError for an activation that has no name elsewhere."""
    block = trunk.blocks[0]
    return TransformerSize(
        width=trunk.embed_dim,
        layers=len(trunk.blocks),
        heads=block.attn.num_heads,  # pyright: ignore
        mlp_width=block.mlp.fc1.out_features,  # pyright: ignore
        activation=activation_name(block.mlp.act),  # pyright: ignore
        norm_eps=block.norm1.eps,  # pyright: ignore
    )


def patched_image(trunk: VisionTransformer) -> PatchedImage:
    """Raises ConfigError for an input that is no square of squares."""
    (height, width), (patch_height, patch_width) = trunk.patch_embed.img_size, trunk.patch_embed.patch_size  # pyright: ignore
    if height != width or patch_height != patch_width:
        raise ConfigError(f"only square pictures and patches can be exported, not {height} x {width} pixels")
    return PatchedImage(height, patch_height)


def text_size(trunk: Any) -> TransformerSize:
    """Of CLIP's or SigLIP's text transformer."""
    config = trunk.config
    return TransformerSize(
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_width=config.intermediate_size,
        activation=config.hidden_act,
        norm_eps=config.layer_norm_eps,
    )


def activation_name(activation: nn.Module) -> str:
    """transformers' name of an activation.

    Raises:
        ConfigError: it is none of those that towers elsewhere have.
    """
    if isinstance(activation, QuickGELU):
        return "quick_gelu"
    approximate = getattr(activation, "approximate", None)
    names = {"GELU": "gelu_pytorch_tanh" if approximate == "tanh" else "gelu", "GELUTanh": "gelu_pytorch_tanh"}
    name = names.get(type(activation).__name__)
    if name is None:
        raise ConfigError(f"the activation {type(activation).__name__} has no counterpart there")
    return name
