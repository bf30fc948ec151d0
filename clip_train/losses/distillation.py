"""The distillation loss between the logits of two models over the global batch, without ever holding either.

With the student's logits S and the teacher's T, the loss is the cross-entropy between the softmaxes of their rows and
of their columns, and its gradient by S is (softmax(S) - softmax(T)) / 2B, by rows and by columns. Forward finds the
sums over rows and columns of both. Then each tile of T becomes one of Q, the teacher's softmaxes, whose products Q Y
and Q^T X give the loss, as sum(Q * S) = s sum(X * Q Y), and the teacher's part of the gradient. Backward adds the
student's.
"""

import math

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from clip_train.distributed import group_size
from clip_train.losses.contrastive import gathered_statistics, scaled_rows
from clip_train.losses.exchange import ReduceScatter, check_features, mean_over_ranks
from clip_train.losses.tiles import (
    accumulation_dtype,
    add_gradients,
    add_soft_targets,
    prepare,
    products_in,
    scale_grad,
)

_LN_2 = math.log(2)

Group = dist.ProcessGroup | None


def distillation_loss(
    image: Float[Tensor, "b dim"],
    text: Float[Tensor, "b dim"],
    logit_scale: Float[Tensor, ""],
    teacher_image: Float[Tensor, "b teacher_dim"],
    teacher_text: Float[Tensor, "b teacher_dim"],
    teacher_logit_scale: Float[Tensor, ""],
    *,
    group: Group = None,
    matmul_dtype: torch.dtype | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the student's softmaxes over the batch against the teacher's, as open_clip's DistillClipLoss.

    Half of it is that of each image over all texts, half that of each text over all images.

    Args:
        image, text: unit vectors of this rank's pairs by the student; every rank has equally many.
        logit_scale: the student's inverse temperature.
        teacher_image, teacher_text, teacher_logit_scale: the same of the teacher, which gets no gradient; of any width.
        group: the ranks that share the batch; all by default. Texts are collected from them, O(B D) memory.
        matmul_dtype: as of `contrastive_loss`.

    Returns:
        The mean loss of the global batch, the same on every rank. Averaged over ranks, its gradients are those of one
        process with the whole batch.

    Raises:
        UnequalBatchesError: on all ranks, if the ranks' features differ in shape.
    """
    check_features(image, text, "gather", group)
    check_features(teacher_image, teacher_text, "gather", group)
    with torch.autocast(image.device.type, enabled=False), products_in(matmul_dtype):
        teacher = (teacher_image.detach(), teacher_text.detach(), teacher_logit_scale.detach())
        return _Distillation.apply(image, text, logit_scale, *teacher, group, matmul_dtype)  # pyright: ignore[reportReturnType]


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, logit_scale, teacher_image, teacher_text, teacher_scale, group, matmul_dtype):
        ctx.group, ctx.matmul_dtype = group, matmul_dtype
        dtype = accumulation_dtype(image.dtype)
        x = scaled_rows(image, logit_scale, matmul_dtype)
        y = prepare(text.to(dtype), matmul_dtype)
        u = scaled_rows(teacher_image.to(dtype), teacher_scale, matmul_dtype)
        v = prepare(teacher_text.to(dtype), matmul_dtype)
        teacher_rows, teacher_columns, all_v = gathered_statistics(u, v, group)
        row_logs, column_logs, ctx.gathered = gathered_statistics(x, y, group)
        all_y = ctx.gathered.wait()
        target_dx = torch.zeros_like(image, dtype=dtype)
        target_dy = torch.zeros_like(all_y, dtype=dtype) if ctx.needs_input_grad[1] else None
        add_soft_targets(u, all_v.wait(), teacher_rows, teacher_columns, x, all_y, target_dx, target_dy)
        ctx.save_for_backward(image, text, logit_scale, row_logs, column_logs, target_dx, target_dy)
        own_logs = column_logs[ctx.gathered.own]
        agreement = logit_scale.to(dtype) * x.dot(target_dx) / len(image)
        return mean_over_ranks(_LN_2 * (row_logs + own_logs).mean() / 2 - agreement / 2, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        with torch.autocast(grad_loss.device.type, enabled=False), products_in(ctx.matmul_dtype):
            return *_gradients(ctx, grad_loss), None, None, None, None, None


def _gradients(ctx, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of the student's images, of its texts and of its scale, each None if it is not wanted."""
    image, text, logit_scale, row_logs, column_logs, target_dx, target_dy = ctx.saved_tensors
    wants_image, _, wants_scale = ctx.needs_input_grad[:3]
    x = scaled_rows(image, logit_scale, ctx.matmul_dtype)
    dx = -target_dx if wants_image or wants_scale else None
    dy = None if target_dy is None else -target_dy
    add_gradients(x, ctx.gathered.wait(), row_logs, column_logs, None, dx, dy)
    unit = grad_loss / (2 * len(image))
    d_scale = unit * x.dot(dx) if wants_scale and dx is not None else None
    d_image = scale_grad(dx if wants_image else None, unit * logit_scale, image.dtype)
    home = None if dy is None else _home(dy, len(text), ctx.group)
    return d_image, scale_grad(home, unit * _LN_2, text.dtype), d_scale  # x carries the scale and 1 / ln 2


def _home(dy: Tensor, count: int, group: Group) -> Tensor:
    """All ranks' sums for this rank's rows, of sums (B, D) over the columns of all."""
    world_size = group_size(group)
    if world_size == 1:
        return dy
    home = dy.new_empty(count, dy.shape[1])
    ReduceScatter(dy.view(world_size, count, -1), home, group).wait()
    return home
