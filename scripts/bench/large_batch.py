"""Time and memory of a training step with cached gradients, beside the plain step and open_clip's two.

    uv run python scripts/bench/large_batch.py --model vit_b_32 --batch 32 --micro-batch 8 --out runs/bench
    uv run python scripts/bench/large_batch.py --batch 16,32,64 --micro-batch 8 --only "ours, cached" --rounds 1

A step is forward, loss, backward, clipping and AdamW in fp32, on one thread, in a fresh process; open_clip runs its own
training loop. A round runs every contender once, so that whatever else the machine does meets all alike.
"""

import argparse
import statistics
import sys
from pathlib import Path

from captions import find_captions
from measure import describe_machine, run_ranks
from record import markdown_table
from step_contenders import CONTENDERS, OPEN_CLIP_NAMES, Sample, StepJob, measure_step

from clip_train.data.files import write_atomic

_HEADER = ("step", "batch", "micro-batches", "time s", "vs its whole batch", "vs open_clip's", "peak MB", "pairs/s")


def main() -> None:
    args = _arguments()
    machine = "".join(f"- {key}: {value}\n" for key, value in describe_machine().items())
    print(f"{machine}- model: {args.model}\n")
    rows = []
    for batch in args.batch:
        rounds = [
            {name: _measured(name, args, batch, number) for name in args.only} for number in range(1, args.rounds + 1)
        ]
        rows += [_row(name, rounds, batch, args.micro_batch) for name in args.only]
    table = markdown_table(_HEADER, rows)
    print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out / "large_batch.md", f"{machine}- model: {args.model}\n\n{table}".encode())


def _measured(name: str, args: argparse.Namespace, batch: int, number: int) -> Sample:
    print(f"batch {batch}, round {number} of {args.rounds}: {name}", file=sys.stderr, flush=True)
    job = StepJob(name, args.model, batch, args.micro_batch, find_captions(batch).texts, steps=args.steps)
    return run_ranks(measure_step, 1, job)[0]


def _row(name: str, rounds: list[dict[str, Sample]], batch: int, micro_batch: int) -> list[str]:
    """Medians over rounds; ratios are taken round by round."""

    def ratio(base: str) -> str:
        if base not in rounds[0]:
            return "–"
        return f"{statistics.median(one[name].seconds / one[base].seconds for one in rounds):.2f}"

    seconds = statistics.median(one[name].seconds for one in rounds)
    memory = statistics.median(one[name].memory for one in rounds)
    whole, kind = name.endswith("whole batch"), name.partition(",")[0]
    counterpart = "open_clip, whole batch" if whole else "open_clip, --accum-freq"
    count = 1 if whole else -(-batch // micro_batch)
    figures = [f"{seconds:.2f}", ratio(f"{kind}, whole batch"), ratio(counterpart), f"{memory / 1e6:.0f}"]
    return [name, str(batch), str(count), *figures, f"{batch / seconds:.2f}"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(OPEN_CLIP_NAMES), default="vit_b_32")
    parser.add_argument("--batch", type=_numbers, default=[32], help="pairs per step, by commas (32)")
    parser.add_argument("--micro-batch", type=int, default=8, help="pairs at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per contender (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per process (%(default)s)")
    parser.add_argument("--only", type=lambda text: text.split(";"), default=list(CONTENDERS), metavar="NAME;NAME")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write large_batch.md")
    args = parser.parse_args()
    if unknown := set(args.only) - set(CONTENDERS):
        parser.error(f"--only: no contender {', '.join(unknown)}; there are {'; '.join(CONTENDERS)}")
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
