"""Attention in bf16 on a processor with a faster backward: torch's own takes four times as long there.

torch 2.15's backward of `scaled_dot_product_attention` on a CPU hardly gains from matrix instructions in bf16. Here it
is five products per tile of the batch, from the log-sum-exp that torch's forward returns (Dao, 2023, arXiv:2307.08691,
section 3.1). Scores and their gradients are computed in fp32, as torch does: small differences are made of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_torchs = F.scaled_dot_product_attention
_SCORES_AT_ONCE = 1 << 19  # some megabytes, which stay in the cache

Heads = Float[Tensor, "b heads tokens width"]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Heads, key: Heads, value: Heads, is_causal: bool, scale: float) -> Heads:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.is_causal, ctx.scale = is_causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(grads[0], *ctx.saved_tensors, ctx.is_causal, ctx.scale), None, None)


# An operator of its own, which torch.compile takes as it is: the loop depends on the size of the batch.
@torch.library.custom_op("clip_train::cpu_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, a tile of the batch at a time."""
    batch, heads, tokens, _ = query.shape
    found = _backward_like(grad, query, key, value, out, lse, is_causal, scale)
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1) if is_causal else None
    step = max(1, _SCORES_AT_ONCE // (heads * tokens**2))
    for start in range(0, batch, step):
        part = slice(start, start + step)
        tile = [x[part].flatten(0, 1) for x in (query, key, value, out, lse, grad)]
        for whole, gradient in zip(found, _tile_backward(tile, future, scale)):
            whole[part] = gradient.unflatten(0, (-1, heads))
    return found


@_backward.register_fake
def _backward_like(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    empty = partial(torch.empty_like, memory_format=torch.contiguous_format)
    return empty(query), empty(key), empty(value)


def _tile_backward(tile: Sequence[Tensor], future: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of some heads' queries, keys and values."""
    query, key, value, out, lse, grad = tile
    scores = torch.baddbmm(-lse[..., None], query.float(), key.float().mT, alpha=scale)
    probability = scores.exp_()
    if future is not None:
        probability.masked_fill_(future, 0)
    own = (grad.float() * out).sum(-1, keepdim=True)
    score_grad = torch.baddbmm(-own, grad.float(), value.float().mT).mul_(probability).mul_(scale).to(query.dtype)
    return score_grad @ key, score_grad.mT @ query, probability.to(query.dtype).mT @ grad


def _attend(
    query: Heads,
    key: Heads,
    value: Heads,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Heads:
    """`scaled_dot_product_attention`, by `_Attention` where that can."""
    inputs = (query, key, value)
    plain = attn_mask is None and not dropout_p and query.shape == key.shape == value.shape and query.ndim == 4
    suited = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.stride(-1) == 1 for x in inputs)
    if plain and suited and query.requires_grad and query.numel():
        return _Attention.apply(*inputs, is_causal, query.shape[-1] ** -0.5 if scale is None else scale)
    return _torchs(*inputs, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


@contextmanager
def fast_attention(device: torch.device) -> Iterator[None]:
    """Inside, timm's and transformers' attention is computed so, where it helps: on a CPU with instructions for bf16.

    Backward belongs inside, too: with checkpointing it computes forward again.
    """
    helps = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not helps or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield
        return
    F.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = _torchs
