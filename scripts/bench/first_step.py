"""From the command line to the end of the first step, beside open_clip's own program, in one run.

    uv run python scripts/bench/first_step.py --out docs/benchmarks
    uv run python scripts/bench/first_step.py --model vit_b_16 --device cuda --batch 256

Both programs are started as a user starts them, and ended when they report a first step. Ours reads the built-in
shards, open_clip the pictures that it makes up itself. The first round, which reads libraries from disk, is left out.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import describe_machine, markdown_table, multiplies_bf16
from open_clip_program import open_clip_command
from step_contenders import OPEN_CLIP_NAMES

from clip_train.data.files import write_atomic

_FIRST_STEP = {"ours": re.compile(r"\bstep 1\b"), "open_clip": re.compile(r"Train Epoch: 0 \[")}
_HEADER = ("model", "batch", "ours s", "open_clip s", "ours / open_clip")


def main() -> None:
    args = _arguments()
    machine = "".join(f"- {key}: {value}\n" for key, value in describe_machine().items())
    machine += f"- device: {args.device}, precision: {args.precision}, rounds: {args.rounds}\n"
    print(machine, flush=True)
    rounds = []
    for number in range(args.rounds + 1):
        rounds.append({name: _seconds(name, args) for name in _FIRST_STEP})
        print(number, rounds[-1], file=sys.stderr, flush=True)
    ours, theirs = ([one[name] for one in rounds[1:]] for name in _FIRST_STEP)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    figures = [f"{statistics.median(ours):.1f}", f"{statistics.median(theirs):.1f}", f"{ratio:.2f}"]
    report = f"{machine}\n{markdown_table(_HEADER, [[args.model, str(args.batch), *figures]])}"
    print(report)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out / "first_step.md", report.encode())


def _seconds(name: str, args: argparse.Namespace) -> float:
    """Until the program says that a step is done."""
    with TemporaryDirectory() as folder:
        command = (_ours if name == "ours" else _open_clip)(args, folder)
        begun = time.perf_counter()
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = []
        try:
            for line in program.stdout or ():
                said.append(line)
                if _FIRST_STEP[name].search(line):
                    return time.perf_counter() - begun
        finally:
            program.kill()
            program.wait()
    raise SystemExit(f"{name} ended without a step:\n{''.join(said[-30:])}")


def _ours(args: argparse.Namespace, folder: str) -> Sequence[str]:
    settings = [f"model={args.model}", f"batch_size={args.batch}", f"output_dir={folder}", "max_steps=100"]
    settings += ["experiment=demo", "eval.every=null", "eval.report=false", "data.val.shards=null"]
    accelerator = "cpu" if args.device == "cpu" else "gpu"
    precision = "bf16-mixed" if args.precision == "bf16" else "32"
    settings += [f"trainer.accelerator={accelerator}", f"trainer.precision={precision}", "data.num_workers=1"]
    return [sys.executable, "-m", "clip_train.commands.train", *settings]


def _open_clip(args: argparse.Namespace, folder: str) -> Sequence[str]:
    return open_clip_command(sys.executable, args, 100, 1, folder, {"dataset-type": "synthetic"})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b_32", choices=OPEN_CLIP_NAMES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="bf16" if multiplies_bf16() else "32", choices=("32", "bf16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
