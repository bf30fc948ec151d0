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
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import describe_machine, multiplies_bf16
from open_clip_program import open_clip_command
from record import about, add_rows, markdown_table, measured, section_title
from step_contenders import OPEN_CLIP_NAMES

_FIRST_STEP = {"ours": re.compile(r"\bstep 1\b"), "open_clip": re.compile(r"Train Epoch: 0 \[")}
HEAD = """
# From the command line to the end of the first step

By `scripts/bench/first_step.py`. Medians over rounds. Ours reads the built-in shards, open_clip pictures that it makes
up.
"""


def main() -> None:
    args = _arguments()
    machine = describe_machine()
    print(about(machine), flush=True)
    found: dict[str, list[float]] = {name: [] for name in _FIRST_STEP}
    for number in range(args.rounds + 1):
        for name in list(found):
            try:
                found[name].append(_seconds(name, args))
                print(f"round {number}: {name} {found[name][-1]:.1f} s", file=sys.stderr, flush=True)
            except RuntimeError as error:
                if name == "ours":
                    raise
                print(f"{name} was not measured: {error}\n", flush=True)
                del found[name]
    row = {"model": args.model, "batch": str(args.batch), **_figures(found), **measured(machine, args.rounds)}
    print(markdown_table(list(row), [list(row.values())]))
    if args.out:
        title = section_title(machine, args.device, args.precision)
        add_rows(args.out / "first_step.md", HEAD, title, about(machine), [row], ("model", "batch"))


def _figures(found: dict[str, list[float]]) -> dict[str, str]:
    """Of all rounds but the first."""
    row = {f"{name} s": f"{statistics.median(seconds[1:]):.1f}" for name, seconds in found.items()}
    if "open_clip" in found:
        ratio = statistics.median(a / b for a, b in zip(found["ours"][1:], found["open_clip"][1:]))
        row["ours / open_clip"] = f"{ratio:.2f}"
    return row


def _seconds(name: str, args: argparse.Namespace) -> float:
    """Until the program says that a step is done. Raises RuntimeError, with its last words, if it does not."""
    with TemporaryDirectory() as folder:
        command = (_ours if name == "ours" else _open_clip)(args, folder)
        begun = time.perf_counter()
        program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = deque(maxlen=1 if name == "open_clip" else 30)
        try:
            for line in program.stdout or ():
                said.append(line)
                if _FIRST_STEP[name].search(line):
                    return time.perf_counter() - begun
        finally:
            program.kill()
            program.wait()
    raise RuntimeError("".join(said).strip() or f"{name} ended without a word")


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
    parser.add_argument("--precision", choices=["32", "bf16"], help="bf16 where the device multiplies in it, else 32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where first_step.md is, or will be")
    args = parser.parse_args()
    args.precision = args.precision or ("bf16" if args.device != "cpu" or multiplies_bf16() else "32")
    return args


if __name__ == "__main__":
    main()
