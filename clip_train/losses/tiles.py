"""Blocks of the logits, a tile at a time: the only place where logits exist.

A block is S = x y^T for local rows x (m, D), which carry the scale, and other rows y (n, D). Tiles are small enough for
the processor's cache, or on a GPU large enough to fill it; nothing m x n is ever held.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

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

    On a CPU the rounded numbers stay in fp32: its products of 16-bit matrices would round their sums as well.
    """
    if matmul_dtype is None:
        return rows.contiguous()
    rounded = rows.to(matmul_dtype).contiguous()
    return rounded.to(rows.dtype) if rows.device.type == "cpu" else rounded


@contextmanager
def products_in(matmul_dtype: torch.dtype | None) -> Iterator[None]:
    """Let oneDNN multiply fp32 matrices as bf16 with sums in fp32, on processors that have instructions for it."""
    if matmul_dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def scale_grad(grad: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The gradient times a factor, in place if the dtype stays."""
    return None if grad is None else grad.mul_(factor).to(dtype)


@dataclass(frozen=True)
class Rows:
    """Local rows (m, D) times a factor, scaled and rounded a tile at a time, so that no copy of all of them is held."""

    features: Tensor
    factor: Tensor
    matmul_dtype: torch.dtype | None

    def __len__(self) -> int:
        return len(self.features)

    def tile(self, part: slice) -> Tensor:
        rows = self.features[part]
        return prepare(rows.to(accumulation_dtype(rows.dtype)) * self.factor, self.matmul_dtype)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Where each tile's rows lie, and they."""
        for part in _parts(len(self), tile_shape(self.features.device)[0]):
            yield part, self.tile(part)

    def matched(self, y: Tensor) -> Float[Tensor, " m"]:
        """Each row's product with the same row of y, rounded like all products."""
        dtype = accumulation_dtype(y.dtype)
        parts = _parts(len(self), 512)
        return torch.cat([torch.linalg.vecdot(self.tile(part).to(dtype), y[part].to(dtype)) for part in parts])

    def dot(self, other: Float[Tensor, "m dim"]) -> Float[Tensor, ""]:
        """The sum of products of all numbers of the features, without the factor, and of `other`."""
        parts = _parts(len(self), 512)
        sums = [torch.linalg.vecdot(self.features[part].to(other.dtype), other[part]).sum() for part in parts]
        return torch.stack(sums).sum()


class Scratch:
    """Memory for two tiles of fp32 (fp64) numbers, used for one tile after the other.

    Memory fresh from the system would add a fourth to the time of a product on a CPU.
    """

    def __init__(self, x: Rows, y: Tensor) -> None:
        self._like, self._numel = y, math.prod(map(min, tile_shape(y.device), (len(x), len(y))))

    @cached_property
    def _buffers(self) -> list[Tensor]:
        return [self._like.new_empty(self._numel, dtype=accumulation_dtype(self._like.dtype)) for _ in range(2)]

    def tiles(self, rows: int, columns: int) -> list[Tensor]:
        """The two as (rows, columns); what is in them is not to be read."""
        return [buffer[: rows * columns].view(rows, columns) for buffer in self._buffers]


def add_statistics(x: Rows, y: Float[Tensor, "n dim"], rows: LogSums, columns: LogSums) -> None:
    """Merge the block's sums over y into `rows` (m) and those over x into `columns` (n)."""
    scratch = Scratch(x, y)
    for xs, x_tile, ys in _tiles(x, y):
        row_sums, column_sums = _tile_statistics(x_tile, y[ys], scratch)
        rows[xs].merge_(*row_sums)
        columns[ys].merge_(*column_sums)


def _tile_statistics(x: Tensor, y: Tensor, scratch: Scratch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Maximum and sum of 2^(S - maximum) of each row, and of each column."""
    if triton_tiles.usable(x):
        return triton_tiles.statistics(x, y)
    tile, shifted = scratch.tiles(len(x), len(y))
    _product(x, y.T, out=tile)
    least, largest = tile.aminmax()
    if _close(least, largest):
        tile.sub_(largest).exp2_()
        return (largest, tile.sum(1)), (largest, tile.sum(0))
    row_max, column_max = tile.amax(1), tile.amax(0)
    row_sum = torch.sub(tile, row_max[:, None], out=shifted).exp2_().sum(1)
    return (row_max, row_sum), (column_max, tile.sub_(column_max).exp2_().sum(0))


def _close(least: Tensor, largest: Tensor) -> bool:
    """Whether one shift serves all numbers between: one exponential per logit instead of two.

    Comparing them costs nothing on a CPU; a GPU would have to be waited for.
    """
    return least.device.type == "cpu" and bool(largest - least < _SAFE_SPREAD)


def add_gradients(
    x: Rows,
    y: Float[Tensor, "n dim"],
    row_logs: Float[Tensor, " m"],
    column_logs: Float[Tensor, " n"],
    diagonal: int | None,
    dx: Float[Tensor, "m dim"] | None,
    dy: Float[Tensor, "n dim"] | None,
) -> None:
    """Add G y to `dx` and G^T x to `dy`, where G = 2^(S - row_logs) + 2^(S - column_logs) - 2 I.

    Args:
        diagonal: the column that belongs to row 0 of x, or None if no column of y belongs to any row.
        dx, dy: fp32 (fp64 for fp64); None where no gradient is wanted.
    """
    scratch = Scratch(x, y)
    for xs, x_tile, ys in _tiles(x, y):
        offset = None if diagonal is None else xs.start + diagonal - ys.start
        weights = _tile_weights(x_tile, y[ys], row_logs[xs], column_logs[ys], offset, scratch)
        _add_products(weights, x_tile, y[ys], _rows_of(dx, xs), _rows_of(dy, ys))


def _tile_weights(
    x: Tensor, y: Tensor, row_logs: Tensor, column_logs: Tensor, offset: int | None, scratch: Scratch
) -> Tensor:
    if triton_tiles.usable(x):
        return triton_tiles.weights(x, y, row_logs, column_logs, offset)
    weights, other = scratch.tiles(len(x), len(y))
    _product(x, y.T, out=weights)
    logs = torch.cat([row_logs, column_logs])
    least, largest = logs.aminmax()
    if _close(least, largest):
        by_row, by_column = torch.exp2(least - logs).split([len(x), len(y)])
        weights.sub_(least).exp2_().mul_(torch.add(by_row[:, None], by_column, out=other))
    else:
        torch.sub(weights, row_logs[:, None], out=other).exp2_()
        weights.sub_(column_logs).exp2_().add_(other)
    if (on_diagonal := _diagonal(weights, offset)) is not None:
        on_diagonal.sub_(2)
    return weights.to(x.dtype)


def add_soft_targets(
    u: Rows,
    v: Float[Tensor, "n teacher_dim"],
    row_logs: Float[Tensor, " m"],
    column_logs: Float[Tensor, " n"],
    x: Rows,
    y: Float[Tensor, "n dim"],
    dx: Float[Tensor, "m dim"],
    dy: Float[Tensor, "n dim"] | None,
) -> None:
    """Add Q y to `dx` and Q^T x to `dy`, where Q = 2^(T - row_logs) + 2^(T - column_logs) and T = u v^T."""
    scratch = Scratch(u, v)
    for us, u_tile, vs in _tiles(u, v):
        weights = _tile_weights(u_tile, v[vs], row_logs[us], column_logs[vs], None, scratch)
        x_tile = x.tile(us)
        _add_products(weights.to(x_tile.dtype), x_tile, y[vs], _rows_of(dx, us), _rows_of(dy, vs))


def add_sigmoid(
    x: Rows,
    y: Float[Tensor, "n dim"],
    bias: Float[Tensor, ""],
    diagonal: int | None,
    dx: Float[Tensor, "m dim"] | None,
    dy: Float[Tensor, "n dim"] | None,
) -> Float[Tensor, "2"]:
    """Sums over the block of log(1 + e^L) - I L and of G = sigmoid(L) - I, where L = S + bias, in fp64.

    Adds G y to `dx` and G^T x to `dy` on the way: no sum over the batch has to be known first.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=y.device)
    scratch = Scratch(x, y)
    for xs, x_tile, ys in _tiles(x, y):
        logits = scratch.tiles(len(x_tile), ys.stop - ys.start)[0]
        _product(x_tile, y[ys].T, out=logits).add_(bias)
        offset = None if diagonal is None else xs.start + diagonal - ys.start
        on_diagonal = _diagonal(logits, offset)  # a view: it follows what happens to the logits
        sums[0] += F.softplus(logits, threshold=40).sum()
        if on_diagonal is not None:
            sums[0] -= on_diagonal.sum()
        if dx is None and dy is None:
            continue
        weights = logits.sigmoid_()
        if on_diagonal is not None:
            on_diagonal.sub_(1)
        sums[1] += weights.sum()
        _add_products(weights.to(x_tile.dtype), x_tile, y[ys], _rows_of(dx, xs), _rows_of(dy, ys))
    return sums


def tile_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile."""
    return (384, 768) if device.type == "cpu" else (4096, 8192)


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _tiles(x: Rows, y: Tensor) -> Iterator[tuple[slice, Tensor, slice]]:
    """Where a tile's rows lie, the rows, and where its columns lie."""
    columns = _parts(len(y), tile_shape(y.device)[1])
    for xs, x_tile in x.tiles():
        for ys in columns:
            yield xs, x_tile, ys


def _rows_of(grad: Tensor | None, part: slice) -> Tensor | None:
    return None if grad is None else grad[part]


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix product with sums and result in fp32 (fp64 for fp64)."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_products(weights: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
    for target, left, right in ((dx, weights, y), (dy, weights.T, x)):
        if target is None:
            continue
        if target.dtype == left.dtype:
            target.addmm_(left, right)
        else:
            target.add_(_product(left, right))


def _diagonal(tile: Tensor, offset: int | None) -> Tensor | None:
    """The part of the tile where row and column are a pair, as a view; `offset` is the column of row 0."""
    if offset is None or not -tile.shape[0] < offset < tile.shape[1]:
        return None
    return tile.diagonal(offset)
