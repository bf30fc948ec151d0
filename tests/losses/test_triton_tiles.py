"""The kernels run in Triton's interpreter, in a process of their own, and on a GPU where there is one."""

import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from clip_train.losses import contrastive_loss, tiles, triton_tiles

SHAPES = [(1, 1, 1), (1, 40, 16), (33, 64, 48), (50, 70, 33)]
LOG2_E = 1.4426950408889634


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process that imports Triton with its interpreter switched on."""
    pytest.importorskip("triton")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(torch.set_num_threads, 1).result()
        yield pool


def rows(count: int, dim: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * F.normalize(torch.randn(count, dim, generator=generator), dim=1)


def log2_sums(logits: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(logits / LOG2_E, dim) * LOG2_E


def check_statistics(x: Tensor, y: Tensor) -> None:
    logits = x.double() @ y.double().T
    for dim, (maximum, total) in zip((1, 0), triton_tiles.statistics(x, y)):
        assert maximum.dtype == total.dtype == torch.float32
        expected = logits.amax(dim, keepdim=True)
        assert_close(maximum.double(), expected.squeeze(dim), rtol=1e-6, atol=1e-5)
        assert_close(total.double(), torch.exp2(logits - expected).sum(dim), rtol=1e-4, atol=0)


def check_weights(x: Tensor, y: Tensor, rtol: float = 1e-4) -> None:
    logits = x.double() @ y.double().T
    row_logs, column_logs = log2_sums(logits, 1), log2_sums(logits, 0)
    both = torch.exp2(logits - row_logs[:, None]) + torch.exp2(logits - column_logs)
    column_minus_row = torch.arange(len(y)) - torch.arange(len(x))[:, None]
    for diagonal in (None, 0, 7, -20, len(y)):
        weights = triton_tiles.weights(x, y, row_logs.float(), column_logs.float(), diagonal)
        assert weights.dtype == x.dtype
        expected = both if diagonal is None else both - 2.0 * (column_minus_row == diagonal)
        assert_close(weights.double(), expected, rtol=rtol, atol=5e-5)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(("m", "n", "dim"), SHAPES)
def test_equals_the_definition(interpreter, m, n, dim, scale):
    x, y = rows(m, dim, scale * LOG2_E), rows(n, dim, seed=1)
    interpreter.submit(check_statistics, x, y).result()
    interpreter.submit(check_weights, x, y).result()


def check_with_bf16_as_default(x: Tensor, y: Tensor) -> None:
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does for precision=bf16-true
    try:
        check_statistics(x, y)
    finally:
        torch.set_default_dtype(torch.float32)


def test_statistics_are_fp32_whatever_the_default(interpreter):
    x, y = rows(33, 48, 100 * LOG2_E), rows(64, 48, seed=1)
    interpreter.submit(check_with_bf16_as_default, x, y).result()


@pytest.mark.parametrize("signs", [[-1.0], [1.0, -1.0]])
def test_neither_overflows_nor_underflows(interpreter, signs):
    """All rows opposite to all columns, or only every other one."""
    one = rows(1, 16)
    x = 100 * LOG2_E * one * torch.tensor(signs).repeat(20)[:, None]
    y = one.repeat(35, 1)
    interpreter.submit(check_statistics, x, y).result()
    interpreter.submit(check_weights, x, y).result()


def test_rounds_after_subtracting(interpreter):
    y = rows(20, 64)
    x = (14 * LOG2_E * y).half()  # matched: on the diagonal the sum is close to the 2 that is taken off
    interpreter.submit(check_statistics, x, y.half()).result()
    interpreter.submit(check_weights, x, y.half(), 1e-3).result()


def check_nan_spreads(x: Tensor, y: Tensor) -> None:
    (_, row_sums), (_, column_sums) = triton_tiles.statistics(x, y)
    assert row_sums.isnan().sum() == 1 and column_sums.isnan().all()


def test_a_nan_is_not_lost(interpreter):
    x, y = rows(20, 16), rows(10, 16, seed=1)
    x[3, 5] = torch.nan
    interpreter.submit(check_nan_spreads, x, y).result()


def pairs(count: int, dim: int) -> tuple[Tensor, Tensor]:
    """Pairs far enough from each other that the loss is not small."""
    image = rows(count, dim)
    return image, F.normalize(image + 3 * rows(count, dim, seed=1), dim=1)


def loss_and_gradients(image: Tensor, text: Tensor, matmul_dtype: torch.dtype | None = None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (image, text, torch.tensor(100.0, device=image.device))]
    loss = contrastive_loss(leaves[0], leaves[1], leaves[2], matmul_dtype=matmul_dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def with_and_without_kernels(count: int, dim: int, matmul_dtype: torch.dtype | None) -> list[list[Tensor]]:
    image, text = pairs(count, dim)
    with (
        mock.patch.object(tiles, "tile_shape", return_value=(40, 25)),
        mock.patch.object(triton_tiles, "weights", wraps=triton_tiles.weights) as weights,
    ):
        by_kernels = loss_and_gradients(image, text, matmul_dtype)
    assert weights.called or matmul_dtype is not None  # a CPU that multiplies bf16 hands it on, the interpreter cannot
    with mock.patch.object(triton_tiles, "usable", return_value=False):
        return [by_kernels, loss_and_gradients(image, text)]


@pytest.mark.parametrize(("matmul_dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 0.01)])
def test_loss_is_that_of_the_plain_path(interpreter, matmul_dtype, tolerance):
    by_kernels, plain = interpreter.submit(with_and_without_kernels, 70, 33, matmul_dtype).result()
    for mine, expected in zip(by_kernels, plain, strict=True):
        assert (mine - expected).norm() <= tolerance * expected.norm()


def test_a_gpu_without_working_kernels_is_warned_about_once(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_tiles, "_tune", fail)
    monkeypatch.setattr(triton_tiles, "_INTERPRETED", False)
    triton_tiles._works.cache_clear()
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda:0"), shape=(8, 4))
    with caplog.at_level(logging.WARNING, logger="clip_train"):
        assert not any(triton_tiles.usable(on_gpu) for _ in range(3))  # pyright: ignore[reportArgumentType]
    triton_tiles._works.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "The loss's Triton kernels do not work on cuda:0, so plain PyTorch takes over:"
        " RuntimeError: Failed to find C compiler"
    ]


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from clip_train.losses import contrastive_loss\n"
        "print(contrastive_loss(torch.eye(4), torch.eye(4), torch.tensor(100.0)).item())"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kernel", ["_statistics_kernel", "_weights_kernel"])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus_that_are_not_here(kernel, capability, monkeypatch, tmp_path):
    """What the interpreter accepts the compiler may not."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tuned = getattr(triton_tiles, kernel)
    config = tuned.configs[-1]
    constants = {"DIM": 40} | {name: size for name, size in config.kwargs.items() if name in tuned.arg_names}
    types = dict.fromkeys(("x", "y", "result"), "*bf16") | dict.fromkeys(("m", "n", "offset"), "i32")
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in tuned.arg_names}
    source = triton.compiler.ASTSource(tuned.fn, signature, constants)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "dim"), [(1000, 64), (5001, 512), (300, 75)])
def test_kernels_on_a_gpu(count, dim):
    image, text = (x.cuda() for x in pairs(count, dim))
    assert triton_tiles.usable(image.bfloat16())
    by_kernels = loss_and_gradients(image, text, torch.bfloat16)
    with mock.patch.object(triton_tiles, "usable", return_value=False):
        plain = loss_and_gradients(image, text, torch.bfloat16)
    assert_close(by_kernels[0], plain[0], rtol=1e-4, atol=0)
    for mine, expected in zip(by_kernels[1:], plain[1:], strict=True):
        assert (mine - expected).norm() <= 1e-2 * expected.norm()
