"""A training step beside open_clip's: the same model, the same batch of real captions, the same precision, in one run.

    uv run python scripts/bench/step.py --out docs/benchmarks
    uv run python scripts/bench/step.py --models vit_b_32,vit_l_14 --batch 1024 --device cuda --precision bf16
    uv run python scripts/bench/step.py --threads 1 --open-clip-main PATH_OF_A_CLONE_OF_OPEN_CLIP

A step is forward, loss, backward, clipping and AdamW on a batch that is in memory; open_clip runs its own training
loop. On a processor it is measured on one thread and on all. Each measurement is a fresh process, and a round runs
every contender once, so that whatever else the machine does meets all alike. Rows are added to what step.md has of
this machine.
"""

import argparse
import os
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from captions import find_captions
from measure import describe_machine, multiplies_bf16, run_ranks
from record import about, add_rows, markdown_table, measured, section_title
from step_contenders import OPEN_CLIP_NAMES, Sample, StepJob, measure_step

_OURS, _CACHED, _THEIRS = "ours, whole batch", "ours, cached", "open_clip, whole batch"
_COMPILED, _MAIN = "ours, compiled", "open_clip main, whole batch"
_KEY = ("model", "batch", "threads")
HEAD = """
# A training step beside open_clip's

By `scripts/bench/step.py`. Medians over rounds; ratios are taken round by round. open_clip's pixels are normalised
before the step, ours in it. `4 micro-batches` are cached gradients of a quarter of the batch at a time.
"""


def main() -> None:
    args = _arguments()
    machine = describe_machine()
    captions = find_captions(max(args.batch), args.shards)
    listed = f"{about(machine)}- captions: {captions.source}\n"
    print(listed, flush=True)
    for model in args.models:
        for batch in args.batch:
            for threads in args.threads:
                rounds = _rounds(args, model, batch, threads, captions.texts)
                row = {"model": model, "batch": str(batch), "threads": str(threads)}
                row |= {"words per text": f"{captions.words(batch):.1f}"}
                row |= {**_figures(args, rounds), **measured(machine, args.rounds)}
                print(markdown_table(list(row), [list(row.values())]), flush=True)
                if args.out:
                    title = section_title(machine, args.device, args.precision)
                    add_rows(args.out / "step.md", HEAD, title, listed, [row], _KEY)


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
            how |= {"compile": "default" if name == _COMPILED else "", "open_clip_main": str(args.open_clip_main)}
            job = StepJob(contender, model, batch, max(1, batch // 4), captions, **how)
            found[-1][name] = run_ranks(measure_step, 1, job)[0]
    return found


def _figures(args: argparse.Namespace, rounds: Sequence[dict[str, Sample]]) -> dict[str, str]:
    """Seconds and ratios by their columns, of what was measured."""

    def seconds(name: str) -> float:
        return statistics.median(one[name].seconds for one in rounds)

    def ratio(name: str, base: str) -> float:
        return statistics.median(one[name].seconds / one[base].seconds for one in rounds)

    found = {"ours s": seconds(_OURS), "open_clip s": seconds(_THEIRS), "ours / open_clip": ratio(_OURS, _THEIRS)}
    if args.open_clip_main:
        found[f"ours / open_clip main {_version(args.open_clip_main)}"] = ratio(_OURS, _MAIN)
    if _CACHED in rounds[0]:
        found["4 micro-batches / whole"] = ratio(_CACHED, _OURS)
    if args.compile:
        found["compiled / ours"] = ratio(_COMPILED, _OURS)
    return {column: f"{figure:.2f}" for column, figure in found.items()}


def _version(checkout: Path) -> str:
    """Of a checkout of open_clip."""
    said = re.search(r'__version__ = ["\'](.+?)["\']', (checkout / "src/open_clip/version.py").read_text())
    return said[1] if said else "unknown"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["vit_b_32"], help="by commas")
    parser.add_argument("--batch", type=_numbers, default=[32], help="pairs per step, by commas (32)")
    parser.add_argument("--threads", type=_numbers, help="of a processor, by commas (1 and all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["32", "bf16"], help="bf16 where the device multiplies in it, else 32")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per contender (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per process (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="ours with trainer.compile=true, too")
    parser.add_argument("--open-clip-main", type=Path, metavar="FOLDER", help="a checkout of its main branch, to add")
    parser.add_argument("--shards", metavar="PATTERN", help="take the captions of these (txt) instead of small photos'")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where step.md is, or will be")
    args = parser.parse_args()
    if unknown := set(args.models) - set(OPEN_CLIP_NAMES):
        parser.error(f"--models: {', '.join(sorted(unknown))} is none of {', '.join(OPEN_CLIP_NAMES)}")
    args.threads = args.threads or ([1] if args.device != "cpu" else sorted({1, os.cpu_count() or 1}))
    args.precision = args.precision or ("bf16" if args.device != "cpu" or multiplies_bf16() else "32")
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
