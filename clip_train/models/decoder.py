"""CoCa's multimodal decoder (Yu et al., 2022): from image tokens and text states to the next token of a caption."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clip_train.errors import ConfigError
from clip_train.models.fast_layers import QuickGELU

# Logits at a time: those of all tokens of a batch, times a vocabulary of 49,408, would take more than the towers.
_LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The `model.decoder` group of the configs.

    Attributes:
        layers, heads, mlp_ratio: size of the decoder, which is as wide as the text tower.
        attn_pooler_queries: of the pooler on the image tower; the first gives the embedding, the others the image's
            tokens.
        attn_pooler_heads: of that pooler.
    """

    layers: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    attn_pooler_queries: int = 256
    attn_pooler_heads: int = 8

    @classmethod
    def of(cls, decoder: Mapping[str, Any]) -> "DecoderConfig":
        """From the composed config; keys may be missing.

        Raises:
            ConfigError: a key is unknown, or a number too small.
        """
        known = [entry.name for entry in fields(cls)]
        if unknown := sorted(set(decoder) - set(known)):
            raise ConfigError(f"model.decoder.{unknown[0]}: no such key; there are {', '.join(known)}")
        config = cls(**decoder)
        least = {"layers": 1, "heads": 1, "mlp_ratio": 0, "attn_pooler_queries": 2, "attn_pooler_heads": 1}
        for key, number in least.items():
            value, whole = getattr(config, key), key != "mlp_ratio"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value >= number:
                name = "whole number" if whole else "number"
                raise ConfigError(f"model.decoder.{key}={value} is not a {name} of at least {number}")
        return config


class Block(nn.Module):
    """Attention and MLP, each added to the stream; attention to the tokens before, or, with `cross`, to an image's."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, act_layer: type[nn.Module], cross: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width) if cross else None
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(mlp_ratio * width), act_layer=act_layer)

    def forward(
        self, x: Float[Tensor, "b length width"], context: Float[Tensor, "b tokens width"] | None = None
    ) -> Float[Tensor, "b length width"]:
        query = self.norm1(x)
        if self.norm_context is None:
            length = query.shape[1]
            later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
            attended = self.attn(query, query, query, attn_mask=later, is_causal=True, need_weights=False)[0]
        else:
            context = self.norm_context(context)
            attended = self.attn(query, context, context, need_weights=False)[0]
        x = x + attended
        return x + self.mlp(self.norm2(x))


class CaptionDecoder(nn.Module):
    """Blocks that look back at the text, each followed by one that looks at the image, and a head over the vocabulary.

    Args:
        width: of the text's states and the image's tokens.
        config: sizes.
        vocab_size: of the token table.
        pad_id: of padding, which is not predicted.
        quick_gelu: OpenAI's x * sigmoid(1.702 x) for GELU.

    Raises:
        ConfigError: the width does not divide over the heads.
    """

    def __init__(self, width: int, config: DecoderConfig, vocab_size: int, pad_id: int, quick_gelu: bool) -> None:
        super().__init__()
        if width % config.heads:
            raise ConfigError(f"model.decoder.heads={config.heads} does not divide model.text.width={width}")
        act_layer = QuickGELU if quick_gelu else nn.GELU
        block = partial(Block, width, config.heads, config.mlp_ratio, act_layer)
        self.pad_id = pad_id
        self.self_blocks = nn.ModuleList(block(cross=False) for _ in range(config.layers))
        self.cross_blocks = nn.ModuleList(block(cross=True) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        _init_decoder(self)

    def forward(
        self,
        image_tokens: Float[Tensor, "b tokens width"],
        states: Float[Tensor, "b length width"],
        labels: Int64[Tensor, "b length"],
    ) -> Float[Tensor, " b"]:
        """Of each caption, the sum of -ln p over its tokens; padding is left out.

        The logits are made a part at a time and made again in backward.

        Args:
            image_tokens: of the image tower.
            states: of each token, by the text tower.
            labels: the token that comes after each.
        """
        kept = labels != self.pad_id
        last, wanted = self._last_states(image_tokens, states)[kept], labels[kept]
        size = max(1, _LOGITS_AT_ONCE // self.head.out_features)
        losses = [
            checkpoint(self._token_losses, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(last.split(size), wanted.split(size), strict=True)
        ]
        by_token = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        by_token[kept] = torch.cat(losses)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return by_token.sum(1)

    def logits(
        self, image_tokens: Float[Tensor, "b tokens width"], states: Float[Tensor, "b length width"], last: int = 0
    ) -> Float[Tensor, "b kept vocab"]:
        """Of the token that comes after each, or after each of the `last` ones if that is not 0."""
        return self.head(self._last_states(image_tokens, states)[:, -last:])

    def _last_states(self, image_tokens: Tensor, states: Tensor) -> Tensor:
        for self_block, cross_block in zip(self.self_blocks, self.cross_blocks, strict=True):
            states = cross_block(self_block(states), image_tokens)
        return self.norm(states)

    def _token_losses(self, states: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(states).float(), labels, reduction="none")


def _init_decoder(decoder: CaptionDecoder) -> None:
    """As the text tower: what writes to the residual stream is scaled down by the square root of its number."""
    blocks = [*decoder.self_blocks, *decoder.cross_blocks]
    width = decoder.head.in_features
    for block in blocks:
        assert isinstance(block, Block)
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=(2 * len(blocks) * width) ** -0.5)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.fc2.weight, std=(2 * len(blocks) * width) ** -0.5)
    nn.init.normal_(decoder.head.weight, std=width**-0.5)
