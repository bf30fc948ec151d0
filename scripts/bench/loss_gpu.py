"""Time and memory of the contrastive loss in bf16 on one GPU, against its own floor and open_clip's loss.

The floor is 8 B^2 D / rate: the logits, once more in backward, and two gradients are four products of 2 B^2 D
operations each; the rate is what the card reaches on a large product of square bf16 matrices.

    python scripts/bench/loss_gpu.py --out loss_gpu.md
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from measure import describe_machine
from torch import Tensor
from torch.nn import functional as F

from clip_train.losses import contrastive_loss, triton_tiles

HEADER = """\
| B | D | loss | time, ms | time / floor | memory, MiB |
|---:|---:|---|---:|---:|---:|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 768])
    parser.add_argument("--out", type=Path, help="a file for the report")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this benchmark needs a CUDA GPU", file=sys.stderr)
        sys.exit(2)
    rate = matmul_rate()
    machine = describe_machine(("torch", "triton", "open-clip-torch"))
    lines = [f"- {key}: {value}" for key, value in machine.items()]
    lines += [f"- product of square bf16 matrices: {rate / 1e12:.0f} TFLOP/s", "", HEADER]
    print("\n".join(lines), flush=True)
    for dim in args.dims:
        for batch_size in args.batch_sizes:
            for line in compare(batch_size, dim, 8 * batch_size**2 * dim / rate):
                print(line, flush=True)
                lines.append(line)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


def matmul_rate(size: int = 8192) -> float:
    """Operations per second of a square bf16 product."""
    a, b = torch.randn(2, size, size, device="cuda").bfloat16()
    return 2 * size**3 / seconds(lambda: a @ b)


def compare(batch_size: int, dim: int, floor: float) -> list[str]:
    """A line of the table for each loss."""
    inputs = [F.normalize(x, dim=1).requires_grad_() for x in torch.randn(2, batch_size, dim, device="cuda")]
    inputs.append(torch.tensor(100.0, device="cuda", requires_grad=True))
    has_kernels = triton_tiles.usable(inputs[0].bfloat16())
    results = {"Triton": measured(tiled, inputs, floor) if has_kernels else "the kernels do not work here | | "}
    with mock.patch.object(triton_tiles, "usable", return_value=False):
        results["plain PyTorch"] = measured(tiled, inputs, floor)
    results["open_clip"] = measured(open_clip, inputs, floor) if find_spec("open_clip") else "not installed | | "
    return [f"| {batch_size} | {dim} | {name} | {result} |" for name, result in results.items()]


def tiled(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return contrastive_loss(image, text, scale, matmul_dtype=torch.bfloat16)


def open_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    from open_clip.loss import ClipLoss

    with torch.autocast("cuda", torch.bfloat16):
        return ClipLoss()(image, text, scale)


def measured(loss: Callable[..., Tensor], inputs: list[Tensor], floor: float) -> str:
    """Time of forward and backward, its ratio to the floor, and peak memory above the inputs, gradients included."""

    def step() -> None:
        torch.autograd.grad(loss(*inputs), inputs)

    try:
        step()  # compiles what is still to be compiled
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        time = seconds(step)
    except torch.OutOfMemoryError:
        return "out of memory | | "
    finally:
        torch.cuda.empty_cache()
    memory = torch.cuda.max_memory_allocated() - before
    return f"{time * 1e3:.2f} | {time / floor:.2f} | {memory / 2**20:.0f}"


def seconds(step: Callable[[], object], repeats: int = 5) -> float:
    """The median time of a step on the GPU."""
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
