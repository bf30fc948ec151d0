"""Our step by batch and setting on one device, as a share of what it multiplies, with open_clip's beside it.

    uv run python scripts/bench/step_sweep.py --out docs/benchmarks
    uv run python scripts/bench/step_sweep.py --device cpu --models vit_b_32 --batch 8 --settings "plain;open_clip"

A step is that of `step.py`, on a batch that is on the device. `% of peak` is model FLOPs utilisation, with the rate of
products of large square matrices, measured in the same run, as the peak, and of texts only their own tokens counted:
open_clip computes padding too, which is not counted for it either. Memory is what the step needs above weights,
optimizer state and the batch. Each measurement is a fresh process.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import describe_machine, markdown_table, multiplies_bf16, run_ranks
from step_contenders import OPEN_CLIP_NAMES, StepJob, measure_step, model_config, real_captions
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from clip_train.data.files import write_atomic
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.planning.hardware import Hardware, measure_hardware
from clip_train.training.utilisation import count_pair_flops

_OURS, _CACHED, _THEIRS = "ours, whole batch", "ours, cached", "open_clip, whole batch"
SETTINGS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "plain": (_OURS, {}),
    "compile": (_OURS, {"compiled": True}),
    "selective": (_OURS, {"checkpointing": "selective"}),
    "blocks": (_OURS, {"checkpointing": "blocks"}),
    "selective, compile": (_OURS, {"checkpointing": "selective", "compiled": True}),
    "float8, compile": (_OURS, {"float8": True, "compiled": True}),
    "4 micro-batches": (_CACHED, {}),
    "open_clip": (_THEIRS, {}),
}
_HEADER = ("model", "batch", "setting", "ms", "pairs/s", "% of peak", "memory, GiB", "time / open_clip's")


def main() -> None:
    args = _arguments()
    (hardware,) = run_ranks(_rates, 1, args.device)
    rate = hardware.rate("bf16-mixed" if args.precision == "bf16" else "32")
    machine = "".join(f"- {key}: {value}\n" for key, value in describe_machine(_PACKAGES).items())
    machine += f"- device: {hardware.name}, {rate / 1e12:.1f} TFLOP/s in products of square matrices\n"
    machine += f"- precision: {args.precision}, rounds: {args.rounds}, steps: {args.steps}\n"
    print(f"{machine}\n{markdown_table(_HEADER, [])}", end="", flush=True)
    captions = real_captions(max(args.batch))
    rows = []
    for model in args.models:
        for batch in args.batch:
            added = _rows(args, model, batch, captions, rate)
            print("\n".join(f"| {' | '.join(row)} |" for row in added), flush=True)
            rows += added
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out / "step_sweep.md", f"{machine}\n{markdown_table(_HEADER, rows)}".encode())


_PACKAGES = ("torch", "timm", "transformers", "torchao", "triton", "open-clip-torch")


def _rates(device: str) -> Hardware:
    return measure_hardware(torch.device(device))


def _rows(args: argparse.Namespace, model: str, batch: int, captions: Sequence[str], rate: float) -> list[list[str]]:
    """One row for each setting; where it fails, with the reason."""
    needed = _flops(model, batch, captions)
    found: dict[str, list[Any]] = {name: [] for name in args.settings}
    reasons: dict[str, str] = {}
    for number in range(args.rounds):
        for name in args.settings:
            if name in reasons:
                continue
            print(f"{model}, batch {batch}, round {number + 1}: {name}", file=sys.stderr, flush=True)
            contender, settings = SETTINGS[name]
            how = {"device": args.device, "precision": args.precision, "steps": args.steps, **settings}
            try:
                job = StepJob(contender, model, batch, max(1, batch // 4), captions, **how)
                found[name] += run_ranks(measure_step, 1, job)
            except (ProcessRaisedException, ProcessExitedException) as error:
                reasons[name] = "out of memory" if "OutOfMemory" in str(error) else str(error).strip().splitlines()[-1]
    theirs = [sample.seconds for sample in found.get("open_clip", [])]
    rows = []
    for name, samples in found.items():
        if name in reasons:
            rows.append([model, str(batch), f"{name}: {reasons[name]}", *[""] * 5])
            continue
        seconds = statistics.median(sample.seconds for sample in samples)
        memory = statistics.median(sample.memory for sample in samples) / 2**30
        ratio = statistics.median(s.seconds / other for s, other in zip(samples, theirs)) if theirs else None
        figures = [f"{1e3 * seconds:.1f}", f"{batch / seconds:.1f}", f"{needed / seconds / rate:.1%}", f"{memory:.2f}"]
        rows.append([model, str(batch), name, *figures, "" if ratio is None else f"{ratio:.2f}"])
    return rows


def _flops(model: str, batch: int, captions: Sequence[str]) -> float:
    """That the batch of `step_contenders.py` needs."""
    config = model_config(model)
    texts = ClipTokenizer(config["text"]["context_length"])([captions[n % len(captions)] for n in range(batch)])
    return count_pair_flops(config, None).of(batch, texts.argmax(axis=1) + 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=_words, default=["vit_b_32", "vit_b_16", "vit_l_14"], help="by commas")
    parser.add_argument("--batch", type=_numbers, default=[256, 1024], help="pairs per step, by commas (256,1024)")
    parser.add_argument(
        "--settings", type=_settings, default=list(SETTINGS), help="by semicolons, of those in the file"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=["32", "bf16"], help="bf16 where the device multiplies in it, else 32")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes per setting (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per process (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write step_sweep.md")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA GPU; --device cpu measures the processor")
    if unknown := set(args.models) - set(OPEN_CLIP_NAMES):
        parser.error(f"--models: {', '.join(sorted(unknown))} is none of {', '.join(OPEN_CLIP_NAMES)}")
    if unknown := set(args.settings) - set(SETTINGS):
        parser.error(f"--settings: {'; '.join(sorted(unknown))} is none of {'; '.join(SETTINGS)}")
    args.precision = args.precision or ("bf16" if args.device != "cpu" or multiplies_bf16() else "32")
    return args


def _words(text: str) -> list[str]:
    return text.split(",")


def _settings(text: str) -> list[str]:
    return text.split(";")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
