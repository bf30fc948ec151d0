"""The image encoder: any timm model, a pooled feature, and a projection."""

import difflib
from collections.abc import Mapping

import timm
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from clip_train.errors import ConfigError


class VisionTower(nn.Module):
    """Normalised pixels to unnormalised embeddings.

    Args:
        name: a timm model.
        image_size: side of the input, in pixels.
        embed_dim: width of the joint embedding.
        quick_gelu: OpenAI's x * sigmoid(1.702 x) for GELU.
        options: further keyword arguments of `timm.create_model`.

    Raises:
        ConfigError: timm has no such model, or it refuses the options.
    """

    def __init__(
        self, name: str, image_size: int, embed_dim: int, quick_gelu: bool = False, options: Mapping | None = None
    ) -> None:
        super().__init__()
        self.trunk = _create_trunk(name, image_size, quick_gelu, dict(options or {}))
        width = int(self.trunk.num_features)  # pyright: ignore[reportArgumentType]
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        if isinstance(self.trunk, VisionTransformer):
            init_vision_transformer(self.trunk)

    def forward(self, pixels: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b embed"]:
        return self.projection(self.trunk(pixels))

    def enable_grad_checkpointing(self) -> None:
        """Recompute each block's activations in backward instead of keeping them."""
        self.trunk.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]


def _create_trunk(name: str, image_size: int, quick_gelu: bool, options: dict) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; near: {', '.join(close)}" if close else ""
        raise ConfigError(f"model.vision.name={name}: timm has no such model{hint}")
    if quick_gelu:
        options["act_layer"] = "quick_gelu"
    try:
        try:
            return timm.create_model(name, num_classes=0, img_size=image_size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(name, num_classes=0, **options)  # a convolutional network takes any size
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"model.vision: timm cannot build {name} with image_size={image_size} {options}: {error}"
        ) from error


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
