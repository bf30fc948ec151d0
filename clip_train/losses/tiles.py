"""Blocks of the logits, a tile at a time: the only place where logits exist.

A block is S = x y^T in units of log 2, for local rows x (m, D) that already carry the scale and other rows y (n, D).
Tiles are small enough for the processor's cache, or on a GPU large enough to fill it; nothing m x n is ever held.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from clip_train.losses import triton_tiles

# exp2 of anything above minus this, summed with a 1, is held by fp32 to rounding.
_SAFE_SPREAD = 60.0


@dataclass
class LogSums:
    """Running logarithms of sums: `maximum` (n,) and `total` (n,) of 2^(S - maximum)."""

    maximum: Tensor
    total: Tensor

    @classmethod
    def empty(cls, count: int, like: Tensor) -> "LogSums":
        kind = {"dtype": accumulation_dtype(like.dtype), "device": like.device}
        return cls(torch.full((count,), -torch.inf, **kind), torch.zeros(count, **kind))

    def __getitem__(self, part: slice) -> "LogSums":
        return LogSums(self.maximum[part], self.total[part])

    def merge_(self, maximum: Tensor, total: Tensor) -> None:
        """Add sums over further terms, in place."""
        larger = torch.maximum(self.maximum, maximum)
        self.total.mul_(torch.exp2(self.maximum - larger)).add_(total * torch.exp2(maximum - larger))
        self.maximum.copy_(larger)

    def log2(self) -> Tensor:
        return self.maximum + self.total.log2()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def prepare(rows: Tensor, matmul_dtype: torch.dtype | None) -> Tensor:
    """Round features to the dtype of the matrix products.

    A processor without bf16 or fp16 instructions multiplies such matrices some 50 times slower than fp32 ones: there
    the rounded numbers stay in fp32, which holds the product of two of them exactly.
    """
    if matmul_dtype is None:
        return rows.contiguous()
    rounded = rows.to(matmul_dtype).contiguous()
    return rounded if rows.is_cuda or _cpu_multiplies(matmul_dtype) else rounded.to(rows.dtype)


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def scale_grad(grad: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The gradient times a factor, in place if the dtype stays."""
    return None if grad is None else grad.mul_(factor).to(dtype)


def add_statistics(
    x: Float[Tensor, "rows dim"], y: Float[Tensor, "columns dim"], rows: LogSums, columns: LogSums
) -> None:
    """Merge the block's sums over y into `rows` (m) and those over x into `columns` (n)."""
    if triton_tiles.usable(x):
        for xs, ys in _tiles(x, y):
            row_sums, column_sums = triton_tiles.statistics(x[xs], y[ys])
            rows[xs].merge_(*row_sums)
            columns[ys].merge_(*column_sums)
        return
    for xs, ys in _tiles(x, y):
        tile = _product(x[xs], y[ys].T)
        row_max, column_max = tile.amax(1), tile.amax(0)
        if (largest := _common_maximum(row_max, column_max)) is not None:
            tile.sub_(largest).exp2_()
            rows[xs].merge_(largest, tile.sum(1))
            columns[ys].merge_(largest, tile.sum(0))
        else:
            rows[xs].merge_(row_max, torch.exp2(tile - row_max[:, None]).sum(1))
            columns[ys].merge_(column_max, tile.sub_(column_max).exp2_().sum(0))


def _common_maximum(row_max: Tensor, column_max: Tensor) -> Tensor | None:
    """The tile's maximum if it serves for every row and column: one exponential per logit instead of two.

    Reading it costs nothing on a CPU; a GPU would have to be waited for.
    """
    if row_max.device.type != "cpu":
        return None
    largest = row_max.max()
    return largest if largest - torch.minimum(row_max.min(), column_max.min()) < _SAFE_SPREAD else None


def add_gradients(
    x: Float[Tensor, "rows dim"],
    y: Float[Tensor, "columns dim"],
    row_logs: Float[Tensor, " rows"],
    column_logs: Float[Tensor, " columns"],
    diagonal: int | None,
    dx: Float[Tensor, "rows dim"] | None,
    dy: Float[Tensor, "columns dim"] | None,
) -> None:
    """Add G y to `dx` and G^T x to `dy`, where G = 2^(S - row_logs) + 2^(S - column_logs) - 2 I.

    Args:
        diagonal: the column that belongs to row 0 of x, or None if no column of y belongs to any row.
        dx, dy: fp32 (fp64 for fp64); None where no gradient is wanted.
    """
    for xs, ys in _tiles(x, y):
        if triton_tiles.usable(x):
            offset = None if diagonal is None else xs.start + diagonal - ys.start
            weights = triton_tiles.weights(x[xs], y[ys], row_logs[xs], column_logs[ys], offset)
        else:
            weights = _product(x[xs], y[ys].T)
            by_row = torch.exp2(weights - row_logs[xs, None])
            weights.sub_(column_logs[ys]).exp2_().add_(by_row)
            _subtract_on_diagonal(weights, xs, ys, diagonal, 2)
            weights = prepare(weights, x.dtype)
        _add_products(weights, x[xs], y[ys], None if dx is None else dx[xs], None if dy is None else dy[ys])


def add_sigmoid(
    x: Float[Tensor, "rows dim"],
    y: Float[Tensor, "columns dim"],
    bias: Float[Tensor, ""],
    diagonal: int | None,
    dx: Float[Tensor, "rows dim"] | None,
    dy: Float[Tensor, "columns dim"] | None,
) -> Float[Tensor, "2"]:
    """Sums over the block of log(1 + e^L) - I L and of G = sigmoid(L) - I, where L = x y^T + bias, in fp64.

    Adds G y to `dx` and G^T x to `dy` on the way: no sum over the batch has to be known first.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=x.device)
    for xs, ys in _tiles(x, y):
        logits = _product(x[xs], y[ys].T).add_(bias)
        sums[0] += F.softplus(logits, threshold=40).sum()
        if (on_diagonal := _diagonal(logits, xs, ys, diagonal)) is not None:
            sums[0] -= on_diagonal.sum()
        if dx is None and dy is None:
            continue
        weights = logits.sigmoid_()
        _subtract_on_diagonal(weights, xs, ys, diagonal, 1)
        sums[1] += weights.sum()
        weights = prepare(weights, x.dtype)
        _add_products(weights, x[xs], y[ys], None if dx is None else dx[xs], None if dy is None else dy[ys])
    return sums


def _tiles(x: Tensor, y: Tensor) -> Iterator[tuple[slice, slice]]:
    height, width = (4096, 8192) if x.is_cuda else (512, 512)
    for i in range(0, len(x), height):
        for j in range(0, len(y), width):
            yield slice(i, min(i + height, len(x))), slice(j, min(j + width, len(y)))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product with sums and result in fp32 (fp64 for fp64)."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b).float()


def _add_products(weights: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
    for target, left, right in ((dx, weights, y), (dy, weights.T, x)):
        if target is None:
            continue
        if target.dtype == left.dtype:
            target.addmm_(left, right)
        else:
            target.add_(_product(left, right))


def _diagonal(tile: Tensor, xs: slice, ys: slice, diagonal: int | None) -> Tensor | None:
    """The part of the tile where row and column are a pair, as a view."""
    if diagonal is None:
        return None
    offset = xs.start + diagonal - ys.start
    return tile.diagonal(offset) if -tile.shape[0] < offset < tile.shape[1] else None


def _subtract_on_diagonal(tile: Tensor, xs: slice, ys: slice, diagonal: int | None, value: float) -> None:
    if (on_diagonal := _diagonal(tile, xs, ys, diagonal)) is not None:
        on_diagonal.sub_(value)
