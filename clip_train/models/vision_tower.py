"""The image encoder: any timm model, a pooled feature, and a projection."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import timm
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from clip_train.errors import ConfigError, first_line
from clip_train.hub import heed_network
from clip_train.models import align_vision as align_vision  # registers its model with timm
from clip_train.models.fast_layers import use_fast_layers
from clip_train.models.projection import make_projection


class VisionTower(nn.Module):
    """Normalised pixels to unnormalised embeddings.

    Args:
        name: a timm model.
        image_size: side of the input, in pixels.
        embed_dim: width of the joint embedding.
        quick_gelu: OpenAI's x * sigmoid(1.702 x) for GELU, unless the options name an activation.
        options: further keyword arguments of `timm.create_model`. With `num_classes` the trunk's own last layer gives
            features that wide.
        proj: `linear`, `mlp`, or `none`: the trunk's features are the embedding.
        pretrained: start from timm's weights, from its cache or the hub.
        patch_dropout: share of the patches that are left out in training (FLIP, Li et al., 2023).

    Raises:
        ConfigError: timm has no such model or weights, it refuses the options, it has no patches to leave out, or its
            features are to be the embedding and are not as wide.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        embed_dim: int,
        quick_gelu: bool = False,
        options: Mapping | None = None,
        proj: str = "linear",
        pretrained: bool = False,
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.trunk = create_trunk(name, image_size, quick_gelu, options or {}, pretrained, patch_dropout)
        width = feature_width(self.trunk)
        self.projection = make_projection(
            proj, width, embed_dim, "model.vision", mlp_width=2 * embed_dim, mlp_bias=True
        )
        if isinstance(self.trunk, VisionTransformer) and self.trunk.attn_pool is None and not pretrained:
            init_vision_transformer(self.trunk)

    def forward(self, pixels: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b embed"]:
        return self.projection(self.trunk(pixels))


def create_trunk(
    name: str,
    image_size: int,
    quick_gelu: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
    pretrained: bool = False,
    patch_dropout: float = 0.0,
) -> nn.Module:
    """A model of timm that returns features; the arguments are those of `VisionTower`, and so are the errors."""
    options = {"num_classes": 0, **_activation(quick_gelu), **options, **_patch_dropout(patch_dropout)}
    return use_fast_layers(_create_model(name, image_size, pretrained, options))


def _activation(quick_gelu: bool) -> dict[str, str]:
    return {"act_layer": "quick_gelu"} if quick_gelu else {}


def _patch_dropout(rate: float) -> dict[str, float]:
    if not 0 <= rate < 1:
        raise ConfigError(f"model.vision.patch_dropout={rate} is a share: give at least 0 and less than 1")
    return {"patch_drop_rate": rate} if rate else {}


def _create_model(name: str, image_size: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; near: {', '.join(close)}" if close else ""
        raise ConfigError(f"model.vision.name={name}: timm has no such model{hint}")
    if pretrained and not timm.is_model_pretrained(name):
        raise ConfigError(f"model.vision.pretrained: timm has no weights of {name}; give false")
    if pretrained:
        heed_network()
    try:
        try:
            return timm.create_model(name, pretrained=pretrained, img_size=image_size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(name, pretrained=pretrained, **options)  # a convolutional network takes any size
    except (TypeError, ValueError, AssertionError) as error:
        if "patch_drop_rate" in str(error):
            raise ConfigError(f"model.vision.patch_dropout: {name} has no patches to leave out; give 0") from error
        raise ConfigError(
            f"model.vision: timm cannot build {name} with image_size={image_size} {options}: {first_line(error)}"
        ) from error
    except Exception as error:  # whatever a download may raise
        if not pretrained:
            raise
        raise ConfigError(
            f"model.vision.pretrained: timm's weights of {name} are not in the cache and cannot be downloaded"
            f" ({first_line(error)}); give false, or fetch them where there is a network"
        ) from error


def feature_width(trunk: nn.Module) -> int:
    """Of what the trunk returns: its own last layer's output if it has one, else that of its pooling."""
    return int(trunk.num_classes or getattr(trunk, "head_hidden_size", None) or trunk.num_features)  # pyright: ignore


def init_vision_transformer(trunk: VisionTransformer) -> None:
    """Initialise as the code of the CLIP paper does (github.com/openai/CLIP, `VisionTransformer`).

    Class token and positions are normal with std width^-1/2. The blocks keep what torch's own layers start from: the
    fused query-key-value matrix Xavier uniform, other matrices Kaiming uniform, attention's biases zero.
    """
    scale = trunk.embed_dim**-0.5
    for parameter in (trunk.cls_token, trunk.pos_embed):
        if parameter is not None:
            nn.init.normal_(parameter, std=scale)
    for module in trunk.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
            module.reset_parameters()
    for name, module in trunk.blocks.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("attn.qkv", "attn.proj")):
            if name.endswith("qkv"):
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
