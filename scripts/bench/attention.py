"""Attention in bf16, forward and backward, by each of torch's backends, by torch's own choice, and by ours.

    python scripts/bench/attention.py
    python scripts/bench/attention.py --device cpu --batch 8

Milliseconds, at the numbers of tokens and heads of the models' texts, which look back only, and pictures; heads are 64
wide. `torch` is its own choice, which `chosen` names. Ours is `models/cpu_attention.py`, for processors only. A cell is
empty where a backend has no kernel.
"""

import argparse
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from measure import describe_machine
from record import markdown_table
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

_WIDTH = 64
_TEXTS = [("text", tokens, heads) for heads in (8, 12) for tokens in (8, 16, 24, 77)]
_SHAPES = [*_TEXTS, ("B/32", 50, 12), ("B/16", 197, 12), ("L/14", 257, 16)]
_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=256, help="texts or pictures at once (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each measurement (%(default)s)")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA GPU; --device cpu measures the processor")
    warnings.simplefilter("ignore")  # of backends that have no kernel
    ways = {"torch": nullcontext, **{name: _only(backend) for name, backend in _BACKENDS.items()}}
    if args.device == "cpu":
        from clip_train.models.cpu_attention import fast_attention

        ways["ours"] = lambda: fast_attention(torch.device("cpu"))
    for key, value in describe_machine(["torch"]).items():
        print(f"- {key}: {value}")
    print(f"- device: {args.device}, batch: {args.batch}, threads: {torch.get_num_threads()}\n")
    print(markdown_table(["of", "tokens", "heads", *ways, "chosen"], []), end="", flush=True)
    for kind, tokens, heads in _SHAPES:
        times = [_milliseconds(way, _step(args, kind == "text", tokens, heads), args.seconds) for way in ways.values()]
        cells = [kind, str(tokens), str(heads), *times, _chosen(args, kind == "text", tokens, heads)]
        print(f"| {' | '.join(cells)} |", flush=True)


def _only(backend: SDPBackend) -> Callable[[], AbstractContextManager]:
    return lambda: sdpa_kernel(backend)


def _inputs(args: argparse.Namespace, tokens: int, heads: int) -> list[torch.Tensor]:
    """Queries, keys and values, (batch, heads, tokens, width), laid out as a projection leaves them."""
    drawn = torch.randn(3, args.batch, tokens, heads, _WIDTH, device=args.device, dtype=torch.bfloat16)
    return [part.transpose(1, 2).requires_grad_() for part in drawn]


def _step(args: argparse.Namespace, causal: bool, tokens: int, heads: int) -> Callable[[], object]:
    query, key, value = _inputs(args, tokens, heads)
    grad = torch.randn_like(query)

    def step() -> object:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return torch.autograd.grad(out, (query, key, value), grad)

    return step


def _milliseconds(way: Callable[[], AbstractContextManager], step: Callable[[], object], seconds: float) -> str:
    with way():
        try:
            step()
        except RuntimeError as error:
            if "kernel" not in str(error).lower():
                raise
            return ""
        timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        return f"{1e3 * timer.blocked_autorange(min_run_time=seconds).median:.3f}"


def _chosen(args: argparse.Namespace, causal: bool, tokens: int, heads: int) -> str:
    query, key, value = _inputs(args, tokens, heads)
    number = torch._fused_sdp_choice(query, key, value, is_causal=causal)
    return {backend.value: name for name, backend in _BACKENDS.items()}.get(number, str(number))


if __name__ == "__main__":
    main()
