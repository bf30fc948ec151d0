"""The pairwise sigmoid loss of SigLIP over the global batch, without ever holding its logits.

Every pair of an image and a text is a question of its own, yes on the diagonal and no elsewhere, so no sum over the
batch has to be known before the gradients: one pass over the tiles gives both, when the loss is computed.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from clip_train.distributed import group_rank, group_size
from clip_train.losses.exchange import (
    GatheredRows,
    ReduceScatter,
    add_,
    around_ring,
    check_features,
    mean_over_ranks,
)
from clip_train.losses.tiles import Rows, accumulation_dtype, add_sigmoid, prepare, products_in, scale_grad

Group = dist.ProcessGroup | None


def sigmoid_loss(
    image: Float[Tensor, "b dim"],
    text: Float[Tensor, "b dim"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    *,
    group: Group = None,
    exchange: str = "ring",
    matmul_dtype: torch.dtype | None = None,
) -> Float[Tensor, ""]:
    """Sigmoid loss (Zhai et al., 2023): with L = scale * image . text + bias over all B x B pairs and z = 1 for pairs
    that belong together, -1 for others, the sum of -log sigmoid(z L), divided by B.

    Args:
        image, text: unit vectors of this rank's pairs; every rank has equally many.
        logit_scale: the inverse temperature itself, not its log. The paper starts from 10.
        logit_bias: the paper starts from -10, as nearly all pairs are negative.
        group: the ranks that share the batch; all by default.
        exchange: `ring` passes the texts on rank by rank, O(b D) memory; `gather` collects them, O(B D).
        matmul_dtype: `torch.bfloat16` or `torch.float16` rounds what is multiplied; sums stay in fp32.

    Returns:
        The loss of the global batch, the same on every rank. Averaged over ranks, its gradients are those of one
        process with the whole batch, those of `logit_scale` and `logit_bias` included.

    Raises:
        UnequalBatchesError: on all ranks, if the ranks' features differ in shape.
        ValueError: there is no such exchange.
    """
    check_features(image, text, exchange, group)
    inputs = (image, text, logit_scale, logit_bias)
    wants = [torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs]
    with torch.autocast(image.device.type, enabled=False), products_in(matmul_dtype):
        return _Sigmoid.apply(*inputs, group, exchange, matmul_dtype, wants)  # pyright: ignore[reportReturnType]


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, logit_scale, logit_bias, group, exchange, matmul_dtype, wants):
        dtype = accumulation_dtype(image.dtype)
        scale, bias = logit_scale.to(dtype), logit_bias.to(dtype)
        x, y = Rows(image, scale, matmul_dtype), prepare(text.to(dtype), matmul_dtype)
        wants_image, wants_text, wants_scale, wants_bias = wants
        dx = torch.zeros_like(image, dtype=dtype) if wants_image or wants_scale or wants_bias else None
        passes = _gathered if exchange == "gather" else _ring
        loss, weight_sum, dy = passes(x, y, bias, dx, wants_text, group)
        b = len(image)
        d_scale = x.dot(dx) / b if wants_scale and dx is not None else None
        ctx.grads = (
            scale_grad(dx if wants_image else None, scale / b, image.dtype),
            scale_grad(dy, torch.ones_like(scale) / b, text.dtype),  # x carries the scale
            d_scale,
            (weight_sum / b).to(logit_bias.dtype) if wants_bias else None,
        )
        return mean_over_ranks((loss / b).to(dtype), group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        return *(None if grad is None else grad * grad_loss for grad in ctx.grads), None, None, None, None


def _ring(x: Rows, y: Tensor, bias: Tensor, dx: Tensor | None, wants_dy: bool, group: Group):
    """Loss sum and weight sum of this rank's rows, and dy, which follows y around the ring and home."""
    sums = torch.zeros(2, dtype=torch.float64, device=y.device)

    def contribute(step: int, block: Tensor) -> list[Tensor]:
        dy = torch.zeros_like(block, dtype=bias.dtype) if wants_dy else None
        sums.add_(add_sigmoid(x, block, bias, 0 if step == 0 else None, dx, dy))
        return [] if dy is None else [dy]

    home = around_ring([y], contribute, add_, group)
    return *sums, home[0] if home else None


def _gathered(x: Rows, y: Tensor, bias: Tensor, dx: Tensor | None, wants_dy: bool, group: Group):
    """Loss sum and weight sum of this rank's rows, and dy, added up over the ranks at the end."""
    b, world_size, rank = len(x), group_size(group), group_rank(group)
    gathered = GatheredRows(y, group)
    dy = y.new_zeros(world_size, *y.shape, dtype=bias.dtype) if wants_dy else None
    sums = torch.zeros(2, dtype=torch.float64, device=y.device)
    for owner in (rank, *range(rank), *range(rank + 1, world_size)):  # its own while the others' rows arrive
        block = y if owner == rank else gathered.wait()[owner * b : (owner + 1) * b]
        diagonal = 0 if owner == rank else None
        sums.add_(add_sigmoid(x, block, bias, diagonal, dx, None if dy is None else dy[owner]))
    if dy is None or world_size == 1:
        return *sums, None if dy is None else dy[0]
    home = torch.empty_like(dy[0])
    ReduceScatter(dy, home, group).wait()
    return *sums, home
