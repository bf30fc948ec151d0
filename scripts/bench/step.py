"""A training step beside open_clip's: the same model, the same batch of real captions, the same precision, in one run.

    uv run python scripts/bench/step.py --out docs/benchmarks
    uv run python scripts/bench/step.py --models vit_b_32,vit_l_14 --batch 1024 --device cuda --precision bf16
    uv run python scripts/bench/step.py --open-clip-main PATH_OF_A_CLONE_OF_OPEN_CLIP

A step is forward, loss, backward, clipping and AdamW on a batch that is in memory; open_clip runs its own training
loop. On a processor it is measured on one thread and on all. Each measurement is a fresh process, and a round runs
every contender once, so that whatever else the machine does meets all alike.
"""

import argparse
import os
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from measure import describe_machine, markdown_table, multiplies_bf16, run_ranks
from step_contenders import OPEN_CLIP_NAMES, Sample, StepJob, measure_step, real_captions

from clip_train.data.files import write_atomic

_OURS, _CACHED, _THEIRS = "ours, whole batch", "ours, cached", "open_clip, whole batch"
_COMPILED, _MAIN = "ours, compiled", "open_clip main, whole batch"
_HEADER = ("model", "batch", "threads", "ours s", "open_clip s", "ours / open_clip", "4 micro-batches / whole")
_COMPILED_HEADER, _MAIN_HEADER = "compiled / ours", "ours / open_clip main"

NOTES = """
Medians over rounds; ratios are taken round by round. Captions are those of {captions}. open_clip's pixels are
normalised before the step, ours in it. `4 micro-batches` are cached gradients of a quarter of the batch at a time.
"""


def main() -> None:
    args = _arguments()
    threads = [1] if args.device != "cpu" else sorted({1, os.cpu_count() or 1})
    machine = "".join(f"- {key}: {value}\n" for key, value in describe_machine().items())
    if args.open_clip_main:
        machine += f"- open_clip main: {_version(args.open_clip_main)}\n"
    machine += f"- device: {args.device}, precision: {args.precision}, rounds: {args.rounds}\n"
    print(machine)
    captions = real_captions(max(args.batch))
    header = [*_HEADER, *([_COMPILED_HEADER] if args.compile else []), *([_MAIN_HEADER] if args.open_clip_main else [])]
    rows = []
    for model in args.models:
        for batch in args.batch:
            for count in threads:
                rows.append(_row(model, batch, count, _rounds(args, model, batch, count, captions)))
                print(markdown_table(header, rows[-1:]), flush=True)
    mean = statistics.mean(len(caption.split()) for caption in captions)
    notes = NOTES.format(captions=f"real pictures, {mean:.1f} words on average")
    report = f"{machine}\n{markdown_table(header, rows)}{notes}"
    print(report)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out / "step.md", report.encode())


def _rounds(
    args: argparse.Namespace, model: str, batch: int, threads: int, captions: Sequence[str]
) -> list[dict[str, Sample]]:
    contenders = [_OURS, _THEIRS, *([_CACHED] if threads == 1 and batch >= 4 else [])]
    contenders += [*([_COMPILED] if args.compile else []), *([_MAIN] if args.open_clip_main else [])]
    found = []
    for number in range(1, args.rounds + 1):
        found.append({})
        for name in contenders:
            print(f"{model}, batch {batch}, round {number}: {name}", file=sys.stderr, flush=True)
            how = {"device": args.device, "precision": args.precision, "threads": threads, "steps": args.steps}
            contender = _OURS if name == _COMPILED else name
            how |= {"compiled": name == _COMPILED, "open_clip_main": str(args.open_clip_main)}
            job = StepJob(contender, model, batch, max(1, batch // 4), captions, **how)
            found[-1][name] = run_ranks(measure_step, 1, job)[0]
    return found


def _row(model: str, batch: int, threads: int, rounds: Sequence[dict[str, Sample]]) -> list[str]:
    def seconds(name: str) -> str:
        return f"{statistics.median(one[name].seconds for one in rounds):.2f}"

    def ratio(name: str, base: str) -> str:
        if name not in rounds[0]:
            return ""
        return f"{statistics.median(one[name].seconds / one[base].seconds for one in rounds):.2f}"

    figures = [seconds(_OURS), seconds(_THEIRS), ratio(_OURS, _THEIRS), ratio(_CACHED, _OURS)]
    optional = [ratio(*pair) for pair in ((_COMPILED, _OURS), (_OURS, _MAIN)) if {*pair} <= rounds[0].keys()]
    return [model, str(batch), str(threads), *figures, *optional]


def _version(checkout: Path) -> str:
    """Of a checkout of open_clip."""
    said = re.search(r'__version__ = ["\'](.+?)["\']', (checkout / "src/open_clip/version.py").read_text())
    return said[1] if said else "unknown"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["vit_b_32"], help="by commas")
    parser.add_argument("--batch", type=_numbers, default=[32], help="pairs per step, by commas (32)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["32", "bf16"], help="bf16 where the device multiplies in it, else 32")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per contender (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per process (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="ours with trainer.compile=true, too")
    parser.add_argument("--open-clip-main", type=Path, metavar="FOLDER", help="a checkout of its main branch, to add")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write step.md")
    args = parser.parse_args()
    if unknown := set(args.models) - set(OPEN_CLIP_NAMES):
        parser.error(f"--models: {', '.join(sorted(unknown))} is none of {', '.join(OPEN_CLIP_NAMES)}")
    args.precision = args.precision or ("bf16" if args.device != "cpu" or multiplies_bf16() else "32")
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
