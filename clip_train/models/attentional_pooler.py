"""CoCa's image encoder (Yu et al., 2022): learned queries read an embedding and a decoder's tokens off a ViT."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from clip_train.errors import ConfigError
from clip_train.models.projection import make_projection
from clip_train.models.vision_tower import create_trunk, init_vision_transformer


class AttentionalPooler(nn.Module):
    """Tokens of any number to `queries` tokens, by attention of learned queries (Lee et al., 2019).

    Args:
        width: of the tokens that come out.
        context_width: of those that go in.
        queries: how many come out.
        heads: of the attention.
    """

    def __init__(self, width: int, context_width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width))
        self.norm_query = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(context_width)
        self.attn = nn.MultiheadAttention(width, heads, kdim=context_width, vdim=context_width, batch_first=True)

    def forward(self, context: Float[Tensor, "b tokens context_width"]) -> Float[Tensor, "b queries width"]:
        context = self.norm_context(context)
        query = self.norm_query(self.query).expand(context.shape[0], -1, -1)  # len() would fix it in an exported graph
        return self.attn(query, context, context, need_weights=False)[0]


class PooledVisionTower(nn.Module):
    """Normalised pixels to unnormalised embeddings, and to tokens for a decoder.

    As open_clip has it, one pooler serves both: its first query gives the embedding, the others the tokens.

    Args:
        name, image_size, embed_dim, quick_gelu, options, proj, patch_dropout: as of `VisionTower`; a transformer of
            timm.
        queries: of the pooler, that of the embedding included.
        heads: of the pooler.

    Raises:
        ConfigError: timm cannot make such a transformer, or the width does not divide over the pooler's heads.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        embed_dim: int,
        queries: int,
        heads: int,
        quick_gelu: bool = False,
        options: Mapping[str, Any] | None = None,
        proj: str = "linear",
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % heads:
            raise ConfigError(f"model.decoder.attn_pooler_heads={heads} does not divide model.embed_dim={embed_dim}")
        self.embed_dim = embed_dim
        tokens = {**(options or {}), "global_pool": "", "final_norm": False}
        self.trunk = create_trunk(name, image_size, quick_gelu, tokens, patch_dropout=patch_dropout)
        if not isinstance(self.trunk, VisionTransformer):
            raise ConfigError(f"model.vision.name={name}: model.decoder needs a vision transformer of timm")
        self.pooler = AttentionalPooler(embed_dim, self.trunk.embed_dim, queries, heads)
        self.norm = nn.LayerNorm(embed_dim)
        self.projection = make_projection(
            proj, embed_dim, embed_dim, "model.vision", mlp_width=2 * embed_dim, mlp_bias=True
        )
        init_vision_transformer(self.trunk)

    def forward(
        self, pixels: Float[Tensor, "b 3 height width"]
    ) -> tuple[Float[Tensor, "b embed"], Float[Tensor, "b tokens embed"]]:
        pooled = self.norm(self.pooler(self.trunk(pixels)))
        return self.projection(pooled[:, 0]), pooled[:, 1:]
