"""CoCa's loss (Yu et al., 2022): contrastive, and the cross-entropy of captions, over the global batch."""

from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from clip_train.distributed import group_size, sum_over_ranks
from clip_train.losses.contrastive import contrastive_loss
from clip_train.losses.exchange import mean_over_ranks

Group = dist.ProcessGroup | None


class CaptioningLoss:
    """Weighted sum of the contrastive loss and of the mean of -ln p over all tokens of the global batch's captions.

    Called as the other losses are.

    Args:
        contrastive_weight, caption_weight: of the two losses.
        group, exchange, matmul_dtype: as of `contrastive_loss`.

    Attributes:
        metrics: `train/contrastive_loss` and `train/caption_loss` of the last call, on the device.
    """

    def __init__(
        self,
        contrastive_weight: float = 1.0,
        caption_weight: float = 2.0,
        *,
        group: Group = None,
        exchange: str = "gather",
        matmul_dtype: torch.dtype | None = None,
    ) -> None:
        self.contrastive_weight, self.caption_weight, self.group = contrastive_weight, caption_weight, group
        self._contrastive_loss = partial(contrastive_loss, group=group, exchange=exchange, matmul_dtype=matmul_dtype)
        self.metrics: dict[str, Tensor] = {}

    def __call__(
        self,
        image: Float[Tensor, "b dim"],
        text: Float[Tensor, "b dim"],
        caption_loss: Float[Tensor, " b"],
        caption_tokens: Int64[Tensor, " b"],
        logit_scale: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """The loss of the global batch, the same on every rank.

        Averaged over ranks, its gradients are those of one process with the whole batch.

        Args:
            image, text, logit_scale: as of `contrastive_loss`.
            caption_loss: of each of this rank's captions, the sum of -ln p over its tokens.
            caption_tokens: how many tokens that is the sum of.

        Raises:
            UnequalBatchesError: on all ranks, if the ranks' features differ in shape.
            ValueError: there is no such exchange.
        """
        contrastive = self._contrastive_loss(image, text, logit_scale)
        captions = mean_token_loss(caption_loss, caption_tokens, self.group)
        self.metrics = {"train/contrastive_loss": contrastive.detach(), "train/caption_loss": captions.detach()}
        return self.contrastive_weight * contrastive + self.caption_weight * captions


def mean_token_loss(
    caption_loss: Float[Tensor, " b"], caption_tokens: Int64[Tensor, " b"], group: Group = None
) -> Float[Tensor, ""]:
    """The mean over all ranks' tokens, with the gradients that `CaptioningLoss` is to have; 0 if there are none."""
    tokens = sum_over_ranks(caption_tokens.sum(), group).clamp(min=1)
    share = caption_loss.sum() * group_size(group) / tokens
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
