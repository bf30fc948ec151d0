"""Position embeddings of another image size or text length, from those that a model was trained with."""

import math

import torch
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed
from torch import Tensor


def resize_image_positions(
    positions: Float[Tensor, "*batch old width"], grid: tuple[int, int], prefix_tokens: int
) -> Float[Tensor, "*batch new width"]:
    """Interpolate the positions of a square of patches, bicubic and antialiased, as timm does.

    Args:
        positions: of the prefix tokens, then of the patches row by row; with or without a first axis of size 1.
        grid: rows and columns of patches to come.
        prefix_tokens: tokens without a place, such as the class token, whose positions stay as they are.

    Raises:
        ValueError: the positions are not those of a square.
    """
    rows = positions if positions.ndim == 3 else positions[None]
    patches = rows.shape[1] - prefix_tokens
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not side:
        raise ValueError(f"{patches} positions beside {prefix_tokens} of prefix tokens are not those of a square")
    resized = resample_abs_pos_embed(
        rows, list(grid), [side, side], num_prefix_tokens=prefix_tokens, interpolation="bicubic", antialias=True
    )
    return resized if positions.ndim == 3 else resized[0]


def stretch_text_positions(
    positions: Float[Tensor, "old width"], context_length: int, keep: int = 20
) -> Float[Tensor, "{context_length} width"]:
    """Positions for longer texts, as Long-CLIP (Zhang et al., 2024) makes them; for shorter texts, the first ones.

    The first `keep`, which short captions have trained well, stay. The others are drawn apart evenly by linear
    interpolation, and the last few follow the line through the last two. Where there are hardly more than `keep`,
    all are drawn apart.

    Args:
        context_length: tokens of a text to come; Long-CLIP's is 248.
        keep: positions that stay as they are.
    """
    old = len(positions)
    if context_length <= old:
        return positions[:context_length].clone()
    keep = keep if old - keep >= 2 else 0
    step = (old - keep) / (context_length - keep)
    places = keep + step * torch.arange(context_length - keep, dtype=torch.float64, device=positions.device)
    lower = places.floor().long().clamp(max=old - 2)
    share = (places - lower)[:, None].to(positions.dtype)
    stretched = positions[lower] + share * (positions[lower + 1] - positions[lower])
    return torch.cat([positions[:keep], stretched])
