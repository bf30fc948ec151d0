"""The two passes over a tile of logits as Triton kernels that never write the logits down.

`statistics` leaves only sums behind. `weights` writes G, once and in 16 bits, and cuBLAS multiplies it by both sides.
Gradients accumulated where G is made would need 128 x 512 fp32 numbers at D = 512: all registers of a multiprocessor.
To write a tile of G and read it twice, much of it within the L2 cache, is little work beside those products.

If TRITON_INTERPRET=1 is set when this is imported, the kernels run on the CPU, slowly, for tests.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

log = logging.getLogger(__name__)


def _module(name: str) -> Any:
    """The module, or None where Triton is not to be had: on macOS, or with PyTorch for CPUs alone."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


triton, tl = _module("triton"), _module("triton.language")
if TYPE_CHECKING:
    from triton.language import constexpr
else:
    constexpr = getattr(tl, "constexpr", None)

_INTERPRETED = triton is not None and triton.knobs.runtime.interpret
_LEAST_CAPABILITY = (8, 0)  # for older ones Triton does not use the tensor cores
_TUNING_TILE = (4096, 8192)  # a whole tile of tiles.py

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages; tuning passes over those that need more shared memory than there is.
_CONFIGS = [
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 3),
    (128, 128, 32, 4, 4),
    (64, 128, 64, 4, 4),
]
if _INTERPRETED:
    _CONFIGS = [(16, 32, 16, 4, 1)]
# Whether these are aligned makes no difference worth compiling again for; n's divisibility does, for G's rows.
_VECTORS = ["row_max", "row_sum", "column_max", "column_sum", "row_logs", "column_logs"]
_LEAST_BLOCK_M, _LEAST_BLOCK_N = min(config[0] for config in _CONFIGS), min(config[1] for config in _CONFIGS)


def usable(x: Tensor) -> bool:
    """Whether the kernels take x and work on its device; fp32 and fp64 are left to cuBLAS, which keeps their precision.

    The first call for a device, dtype and width compiles and tunes the kernels; if that fails, a warning says why.
    """
    if _INTERPRETED:
        return x.dtype in (torch.float32, torch.float16)  # the interpreter multiplies bf16's bits as integers
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _works(x.device, x.dtype, x.shape[1])


@functools.cache
def _works(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    try:
        _tune(device, dtype, dim)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and drivers raise anything
        reason = f"{type(error).__name__}: {error}"
        log.warning("The loss's Triton kernels do not work on %s, so plain PyTorch takes over: %s", device, reason)
        return False
    return True


def _tune(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    """Run both kernels once on a whole tile, which picks the fastest configs."""
    if triton is None:
        raise RuntimeError("Triton is not installed")
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < _LEAST_CAPABILITY:
        raise RuntimeError("compute capability {}.{} is below {}.{}".format(*capability, *_LEAST_CAPABILITY))
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    height, width = _TUNING_TILE
    rows = torch.randn(height + width, dim, device=device, generator=generator).mul_(dim**-0.5).to(dtype)
    statistics(rows[:height], rows[height:])
    weights(rows[:height], rows[height:], rows.new_zeros(height).float(), rows.new_zeros(width).float(), 0)


def statistics(
    x: Float[Tensor, "m dim"], y: Float[Tensor, "n dim"]
) -> tuple[
    tuple[Float[Tensor, " m"], Float[Tensor, " m"]],
    tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
]:
    """Of each row of S = x y^T, its maximum and the sum of 2^(S - maximum); then of each column. All fp32."""
    (m, dim), n = x.shape, len(y)
    fp32 = functools.partial(torch.empty, dtype=torch.float32, device=x.device)  # whatever the default is
    rows, columns = fp32(2, triton.cdiv(n, _LEAST_BLOCK_N), m), fp32(2, triton.cdiv(m, _LEAST_BLOCK_M), n)
    with torch.cuda.device_of(x):
        _statistics_kernel[_grid(m, n)](x.contiguous(), y.contiguous(), *rows, *columns, m, n, DIM=dim)
    block = _statistics_kernel.best_config.kwargs  # decides how many parts were written
    row_parts, column_parts = triton.cdiv(n, block["BLOCK_N"]), triton.cdiv(m, block["BLOCK_M"])
    return _merged(*rows[:, :row_parts]), _merged(*columns[:, :column_parts])


def weights(
    x: Float[Tensor, "m dim"],
    y: Float[Tensor, "n dim"],
    row_logs: Float[Tensor, " m"],
    column_logs: Float[Tensor, " n"],
    diagonal: int | None,
) -> Float[Tensor, "m n"]:
    """G = 2^(S - row_logs) + 2^(S - column_logs) - 2 I in x's dtype, rounded after the subtraction.

    Args:
        diagonal: the column of row 0 in I, possibly outside of the tile; None if I is nowhere in it.
    """
    (m, dim), n = x.shape, len(y)
    result = x.new_empty(m, n)
    offset = n if diagonal is None else diagonal
    with torch.cuda.device_of(x):
        _weights_kernel[_grid(m, n)](
            x.contiguous(), y.contiguous(), row_logs, column_logs, result, m, n, offset, DIM=dim
        )
    return result


def _grid(m: int, n: int) -> Callable[[dict[str, int]], tuple[int]]:
    return lambda block: (triton.cdiv(m, block["BLOCK_M"]) * triton.cdiv(n, block["BLOCK_N"]),)


def _merged(
    maxima: Float[Tensor, "parts count"], totals: Float[Tensor, "parts count"]
) -> tuple[Float[Tensor, " count"], Float[Tensor, " count"]]:
    maximum = maxima.amax(0)
    return maximum, (totals * torch.exp2(maxima - maximum)).sum(0)


def _jit(function: Callable[..., Any]) -> Any:
    """A function for kernels to call."""
    return function if triton is None else triton.jit(function)


def _kernel(function: Callable[..., Any]) -> Any:
    """A kernel, tuned for each width of the features."""
    if triton is None:
        return function
    configs = [
        # Fused multiply-adds are Triton's default, but one that it says will change.
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "enable_fp_fusion": True}, warps, stages)
        for m, n, k, warps, stages in _CONFIGS
    ]
    jitted = triton.jit(function, do_not_specialize=["m", "offset"], do_not_specialize_on_alignment=_VECTORS)
    # Results are kept on disk, so that a run computes the same after it is resumed.
    return triton.autotune(configs, key=["DIM"], cache_results=True)(jitted)


@_jit
def _block(m, n, BLOCK_M: constexpr, BLOCK_N: constexpr):
    """The place of this program's block. Eight rows of blocks go together: what they share stays in the L2 cache."""
    height, width = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    first = program // (8 * width) * 8
    group = tl.minimum(height - first, 8)
    within = program % (8 * width)
    return first + within % group, within // group


@_jit
def _logits(x, y, rows, columns, m, n, DIM: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr):
    """A block of S; past the edge, the last row or column over again."""
    x_rows = x + tl.minimum(rows, m - 1)[:, None] * DIM
    y_rows = y + tl.minimum(columns, n - 1)[None, :] * DIM
    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DIM, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if DIM % BLOCK_K == 0:
            x_part = tl.load(x_rows + k[None, :])
            y_part = tl.load(y_rows + k[:, None])
        else:
            x_part = tl.load(x_rows + k[None, :], mask=k[None, :] < DIM, other=0.0)
            y_part = tl.load(y_rows + k[:, None], mask=k[:, None] < DIM, other=0.0)
        logits = tl.dot(x_part, y_part, logits, input_precision="ieee")
    return logits


@_kernel
def _statistics_kernel(
    x,
    y,
    row_max,
    row_sum,
    column_max,
    column_sum,
    m,
    n,
    DIM: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
):
    """Maxima and sums of each block: of its rows into (column blocks, m), of its columns into (row blocks, n)."""
    i, j = _block(m, n, BLOCK_M, BLOCK_N)
    rows, columns = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = _logits(x, y, rows, columns, m, n, DIM, BLOCK_M, BLOCK_N, BLOCK_K)
    # What is repeated past the edge leaves every maximum as it is: only the sums need a mask.
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    by_row, by_column = tl.max(logits, 1), tl.max(logits, 0)
    largest = tl.max(by_row, 0)
    smallest = tl.minimum(tl.min(by_row, 0), tl.min(by_column, 0))
    # After the product, exponentials are most of the work. If fp32 holds 2^(largest - smallest), one serves both sums.
    if largest - smallest < 60.0:
        terms = tl.where(inside, tl.exp2(logits - largest), 0.0)
        by_row_sum = tl.sum(terms, 1) * tl.exp2(largest - by_row)
        by_column_sum = tl.sum(terms, 0) * tl.exp2(largest - by_column)
    else:
        by_row_sum = tl.sum(tl.where(inside, tl.exp2(logits - by_row[:, None]), 0.0), 1)
        by_column_sum = tl.sum(tl.where(inside, tl.exp2(logits - by_column[None, :]), 0.0), 0)
    tl.store(row_max + j * m + rows, by_row, mask=rows < m)
    tl.store(row_sum + j * m + rows, by_row_sum, mask=rows < m)
    tl.store(column_max + i * n + columns, by_column, mask=columns < n)
    tl.store(column_sum + i * n + columns, by_column_sum, mask=columns < n)


@_kernel
def _weights_kernel(
    x,
    y,
    row_logs,
    column_logs,
    result,
    m,
    n,
    offset,
    DIM: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
):
    """A block of G."""
    i, j = _block(m, n, BLOCK_M, BLOCK_N)
    rows, columns = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = _logits(x, y, rows, columns, m, n, DIM, BLOCK_M, BLOCK_N, BLOCK_K)
    by_row = tl.load(row_logs + tl.minimum(rows, m - 1))
    by_column = tl.load(column_logs + tl.minimum(columns, n - 1))
    highest = tl.maximum(tl.max(by_row, 0), tl.max(by_column, 0))
    lowest = tl.minimum(tl.min(by_row, 0), tl.min(by_column, 0))
    middle = (highest + lowest) / 2
    # One exponential per logit again. No logit is above its sums, so no factor is above 2^61 and no product above 2.
    if highest - lowest < 120.0:
        factors = tl.exp2(middle - by_row)[:, None] + tl.exp2(middle - by_column)[None, :]
        values = tl.exp2(logits - middle) * factors
    else:
        values = tl.exp2(logits - by_row[:, None]) + tl.exp2(logits - by_column[None, :])
    values = tl.where(columns[None, :] == rows[:, None] + offset, values - 2.0, values)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(result + rows[:, None] * n + columns[None, :], values.to(result.dtype.element_ty), mask=inside)
