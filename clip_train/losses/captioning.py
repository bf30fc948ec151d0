"""CoCa's loss (Yu et al., 2022): contrastive, and the cross-entropy of captions, over the global batch."""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from clip_train.distributed import group_size, sum_over_ranks
from clip_train.losses.contrastive import contrastive_loss
from clip_train.losses.exchange import mean_over_ranks

Group = dist.ProcessGroup | None


def captioning_loss(
    image: Float[Tensor, "b dim"],
    text: Float[Tensor, "b dim"],
    caption_loss: Float[Tensor, " b"],
    caption_tokens: Int64[Tensor, " b"],
    logit_scale: Float[Tensor, ""],
    *,
    contrastive_weight: float = 1.0,
    caption_weight: float = 2.0,
    group: Group = None,
    exchange: str = "gather",
    matmul_dtype: torch.dtype | None = None,
) -> Float[Tensor, ""]:
    """Weighted sum of the contrastive loss and of the mean of -ln p over all tokens of the global batch's captions.

    Args:
        image, text, logit_scale, group, exchange, matmul_dtype: as of `contrastive_loss`.
        caption_loss: of each of this rank's captions, the sum of -ln p over its tokens.
        caption_tokens: how many tokens that is the sum of.
        contrastive_weight, caption_weight: of the two losses.

    Returns:
        The loss of the global batch, the same on every rank. Averaged over ranks, its gradients are those of one
        process with the whole batch.

    Raises:
        UnequalBatchesError: on all ranks, if the ranks' features differ in shape.
        ValueError: there is no such exchange.
    """
    contrastive = contrastive_loss(image, text, logit_scale, group=group, exchange=exchange, matmul_dtype=matmul_dtype)
    return contrastive_weight * contrastive + caption_weight * mean_token_loss(caption_loss, caption_tokens, group)


def mean_token_loss(
    caption_loss: Float[Tensor, " b"], caption_tokens: Int64[Tensor, " b"], group: Group = None
) -> Float[Tensor, ""]:
    """The mean over all ranks' tokens, with the gradients that `captioning_loss` is to have; 0 if there are none."""
    tokens = sum_over_ranks(caption_tokens.sum(), group).clamp(min=1)
    share = caption_loss.sum() * (group_size(group) / tokens)
    return _MeanOverRanks.apply(share, group)  # pyright: ignore[reportReturnType]


class _MeanOverRanks(torch.autograd.Function):
    """The mean; its gradient is left to the averaging of gradients over ranks."""

    @staticmethod
    def forward(ctx, local: Tensor, group: Group) -> Tensor:
        return mean_over_ranks(local, group).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
