"""The symmetric InfoNCE loss of CLIP over the global batch, without ever holding its logits.

With local rows X (b, D), all text rows Y (B, D) and S = s X Y^T, only one side travels: the sums over a row of S are
local, those over a column are added up over the ranks. Backward computes each tile of S again, forms
G = exp(S - row) + exp(S - column) - 2 I, and sends G^T X home to the texts' ranks. docs/large_batch.md has the details.
"""

import math

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from clip_train.distributed import group_rank, group_size, sum_over_ranks
from clip_train.losses.exchange import (
    GatheredRows,
    ReduceScatter,
    add_,
    around_ring,
    check_features,
    maximum_over_ranks_,
    mean_over_ranks,
)
from clip_train.losses.tiles import (
    LogSums,
    Rows,
    accumulation_dtype,
    add_gradients,
    add_statistics,
    prepare,
    products_in,
    scale_grad,
)

_LN_2 = math.log(2)
# Gradients go home in this many parts, each while the next is computed; parts with fewer rows would make small tiles.
_PARTS, _LEAST_PART = 8, 512

Group = dist.ProcessGroup | None


def contrastive_loss(
    image: Float[Tensor, "b dim"],
    text: Float[Tensor, "b dim"],
    logit_scale: Float[Tensor, ""],
    *,
    group: Group = None,
    exchange: str = "gather",
    matmul_dtype: torch.dtype | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (Radford et al., 2021) where pair i of every rank's rows belongs together.

    Args:
        image, text: unit vectors of this rank's pairs; every rank has equally many.
        logit_scale: the inverse temperature itself, not its log.
        group: the ranks that share the batch; all by default.
        exchange: `gather` collects all ranks' texts, O(B D) memory per rank; `ring` passes them on rank by rank,
            O(b D) memory and half as much traffic again.
        matmul_dtype: `torch.bfloat16` or `torch.float16` rounds what is multiplied; sums stay in fp32. None multiplies
            in the features' own precision, at least fp32.

    Returns:
        The mean loss of the global batch, the same on every rank. Averaged over ranks, its gradients are those of one
        process with the whole batch, `logit_scale`'s included.

    Raises:
        UnequalBatchesError: on all ranks, if the ranks' features differ in shape.
        ValueError: there is no such exchange.
    """
    check_features(image, text, exchange, group)
    with torch.autocast(image.device.type, enabled=False), products_in(matmul_dtype):
        return _Contrastive.apply(image, text, logit_scale, group, exchange, matmul_dtype)  # pyright: ignore[reportReturnType]


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, logit_scale, group, exchange, matmul_dtype):
        ctx.group, ctx.matmul_dtype = group, matmul_dtype
        x = scaled_rows(image, logit_scale, matmul_dtype)
        y = prepare(text.to(accumulation_dtype(image.dtype)), matmul_dtype)
        statistics = gathered_statistics if exchange == "gather" else _ring_statistics
        row_logs, column_logs, ctx.gathered = statistics(x, y, group)
        own_logs = column_logs if ctx.gathered is None else column_logs[ctx.gathered.own]
        ctx.save_for_backward(image, text, logit_scale, row_logs, column_logs)
        return mean_over_ranks(_LN_2 * ((row_logs + own_logs) / 2 - x.matched(y)).mean(), group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        with torch.autocast(grad_loss.device.type, enabled=False), products_in(ctx.matmul_dtype):
            return *_gradients(ctx, grad_loss), None, None, None


def _gradients(ctx, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of the images, of the texts and of the scale, each None if it is not wanted."""
    image, text, logit_scale, row_logs, column_logs = ctx.saved_tensors
    wants_image, wants_text, wants_scale = ctx.needs_input_grad[:3]
    x = scaled_rows(image, logit_scale, ctx.matmul_dtype)
    dx = torch.zeros_like(image, dtype=row_logs.dtype) if wants_image or wants_scale else None
    if ctx.gathered is None:
        y = prepare(text.to(row_logs.dtype), ctx.matmul_dtype)
        dy = _ring_gradients(x, y, row_logs, column_logs, dx, wants_text, ctx.group)
    else:
        dy = _gathered_gradients(x, ctx.gathered.wait(), row_logs, column_logs, dx, wants_text, ctx.group)
    unit = grad_loss / (2 * len(image))
    d_scale = unit * x.dot(dx) if wants_scale and dx is not None else None
    d_image = scale_grad(dx if wants_image else None, unit * logit_scale, image.dtype)
    return d_image, scale_grad(dy, unit * _LN_2, text.dtype), d_scale  # x carries the scale and 1 / ln 2


def scaled_rows(image: Tensor, logit_scale: Tensor, matmul_dtype: torch.dtype | None) -> Rows:
    """The images, scaled so that S comes in units of log 2."""
    return Rows(image, logit_scale.to(accumulation_dtype(image.dtype)) / _LN_2, matmul_dtype)


def gathered_statistics(x: Rows, y: Tensor, group: Group) -> tuple[Tensor, Tensor, GatheredRows]:
    """Log-sums of this rank's rows (b) and of all columns (B)."""
    gathered = GatheredRows(y, group)
    rows, columns = LogSums.empty(len(x), y), LogSums.empty(len(y) * group_size(group), y)
    add_statistics(x, y, rows, columns[gathered.own])  # while the others' rows arrive
    for part in gathered.others:
        add_statistics(x, gathered.wait()[part], rows, columns[part])
    maximum = columns.maximum.clone()
    maximum_over_ranks_(maximum, group)
    columns.total.mul_(torch.exp2(columns.maximum - maximum))
    sum_over_ranks(columns.total, group)
    return rows.log2(), LogSums(maximum, columns.total).log2(), gathered


def _gathered_gradients(
    x: Rows, y: Tensor, row_logs: Tensor, column_logs: Tensor, dx: Tensor | None, wants_dy: bool, group: Group
) -> Tensor | None:
    """Fill dx; returns this rank's dy. The columns are taken in parts, and a part goes home while the next is made."""
    b, world_size, rank = len(x), group_size(group), group_rank(group)
    if world_size == 1:
        dy = torch.zeros_like(y, dtype=row_logs.dtype) if wants_dy else None
        add_gradients(x, y, row_logs, column_logs, 0, dx, dy)
        return dy
    home = y.new_empty(b, y.shape[1], dtype=row_logs.dtype) if wants_dy else None
    part_rows = max(_LEAST_PART, -(-b // _PARTS))
    on_its_way = None
    for start in range(0, b, part_rows):
        size = min(part_rows, b - start)
        dy = y.new_zeros(world_size, size, y.shape[1], dtype=row_logs.dtype) if wants_dy else None
        for owner in range(world_size):
            columns = slice(owner * b + start, owner * b + start + size)
            diagonal = -start if owner == rank else None
            dy_block = None if dy is None else dy[owner]
            add_gradients(x, y[columns], row_logs, column_logs[columns], diagonal, dx, dy_block)
        if dy is not None and home is not None:
            if on_its_way is not None:
                on_its_way.wait()
            on_its_way = ReduceScatter(dy, home[start : start + size], group)
    if on_its_way is not None:
        on_its_way.wait()
    return home


def _ring_statistics(x: Rows, y: Tensor, group: Group) -> tuple[Tensor, Tensor, None]:
    """Log-sums of this rank's rows (b) and columns (b): a block's column sums follow it around the ring and home."""
    rows = LogSums.empty(len(x), y)

    def contribute(step: int, block: Tensor) -> list[Tensor]:
        columns = LogSums.empty(len(block), block)
        add_statistics(x, block, rows, columns)
        return [columns.maximum, columns.total]

    columns = LogSums(*around_ring([y], contribute, lambda own, others: LogSums(*own).merge_(*others), group))
    return rows.log2(), columns.log2(), None


def _ring_gradients(
    x: Rows, y: Tensor, row_logs: Tensor, column_logs: Tensor, dx: Tensor | None, wants_dy: bool, group: Group
) -> Tensor | None:
    """Fill dx; returns this rank's dy, which follows y around the ring and home."""

    def contribute(step: int, block: Tensor, block_logs: Tensor) -> list[Tensor]:
        dy = torch.zeros_like(block, dtype=row_logs.dtype) if wants_dy else None
        add_gradients(x, block, row_logs, block_logs, 0 if step == 0 else None, dx, dy)
        return [] if dy is None else [dy]

    home = around_ring([y, column_logs], contribute, add_, group)
    return home[0] if home else None
