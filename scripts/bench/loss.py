"""Time, memory and traffic of our losses, full logits and open_clip's losses, side by side.

    uv run python scripts/bench/loss.py --batch 1024,4096 --ranks 1,2 --out runs/bench
    uv run python scripts/bench/loss.py --only "ours gather,open_clip default" --batch 16384
    uv run python scripts/bench/loss.py --memory-only --slice 512 --batch 262144,1048576

Each measurement runs in fresh processes, one thread per rank. A round runs every contender once, so that whatever else
the machine does meets all alike. With more ranks than cores, times say nothing. The first lines and the table go to the
standard output as they come; `--out` writes them to `loss.md`, with a plot, `loss.png`, after every setting.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

from loss_contenders import BLOCK, CONTENDERS, Contender, measure_loss, measure_slice
from loss_report import HEADER, NOTES, SLICE_HEADER, SLICE_NOTES, Result, disagreements, plot, rows, slice_rows
from measure import available_bytes, describe_machine, multiplies_bf16, run_ranks
from record import markdown_table

from clip_train.data.files import write_atomic


def main() -> None:
    args = _arguments()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    machine = "".join(f"- {key}: {value}\n" for key, value in describe_machine().items())
    print(machine)
    if args.memory_only:
        _slices(args, machine)
    else:
        _whole_losses(args, machine)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=_numbers, default=[1024, 4096, 8192, 16384], help="global batches, by commas")
    parser.add_argument("--dim", type=_numbers, default=[512], help="widths of the features (%(default)s)")
    parser.add_argument("--ranks", type=_numbers, default=[1], help="numbers of processes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per contender (%(default)s)")
    parser.add_argument("--scale", type=float, default=14.3, help="the softmax losses' inverse temperature")
    parser.add_argument("--only", type=_names, help=f"contenders, by commas, of: {', '.join(CONTENDERS)}")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="for logits (available less 2)")
    parser.add_argument("--memory-only", action="store_true", help="real buffers, but compute a slice; ours only")
    parser.add_argument("--slice", type=int, default=512, metavar="ROWS", help="rows of that slice (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write loss.md and loss.png")
    args = parser.parse_args()
    for batch, ranks in product(args.batch, args.ranks):
        if batch % (BLOCK * ranks):
            parser.error(f"--batch {batch} is no multiple of {BLOCK} for each of {ranks} ranks")
    if args.memory_limit is None:
        args.memory_limit = available_bytes() / 2**30 - 2
    return args


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(CONTENDERS)}")
    return names


def _whole_losses(args: argparse.Namespace, machine: str) -> None:
    """Measure, show and write every setting in turn; raises if losses disagree."""
    print(markdown_table(HEADER, []), end="")
    results: list[Result] = []
    for ranks, dim, batch in product(args.ranks, args.dim, args.batch):
        fresh = _measure(ranks, dim, batch, args)
        results += fresh
        print("".join(f"| {' | '.join(cells)} |\n" for cells in rows(fresh)), end="", flush=True)
        if args.out:
            write_atomic(args.out / "loss.md", f"{machine}\n{markdown_table(HEADER, rows(results))}{NOTES}".encode())
            write_atomic(args.out / "loss.png", plot(results))
        if wrong := disagreements(results):
            raise RuntimeError("losses disagree: " + "; ".join(wrong))


def _measure(ranks: int, dim: int, batch: int, args: argparse.Namespace) -> list[Result]:
    """All contenders in one setting, round by round."""
    chosen = [contender for contender in _contenders(args.only) if ranks > 1 or not contender.several_ranks]
    results = [Result(contender, ranks, batch, dim) for contender in chosen]
    for result in results:
        result.not_run = _obstacle(result, args)
    for turn in range(args.rounds):
        for result in results:
            if result.not_run:
                continue
            name = result.contender.name
            _progress(f"{ranks} ranks, D={dim}, B={batch}, round {turn + 1} of {args.rounds}: {name}")
            # What is sent is the same every time; once is enough.
            sample = (name, batch, dim, args.scale, ranks > 1 and turn == 0)
            result.rounds.append(run_ranks(measure_loss, ranks, *sample))
    return results


def _contenders(only: list[str] | None) -> list[Contender]:
    return [CONTENDERS[name] for name in only or CONTENDERS]


def _obstacle(result: Result, args: argparse.Namespace) -> str:
    """Why the contender should not run; empty if it may."""
    needed = result.contender.bytes_needed(result.batch, result.ranks) / 2**30
    if needed > args.memory_limit:
        return f"does not fit: {needed:.1f} GiB of logits"
    if result.contender.name == "open_clip bf16 autocast" and not args.only and not multiplies_bf16():
        return "no bf16 instructions"
    return ""


def _slices(args: argparse.Namespace, machine: str) -> None:
    """The memory of very large batches; only of losses that are made of tiles."""
    print(SLICE_NOTES)
    print(markdown_table(SLICE_HEADER, []), end="")
    tiled = [contender for contender in _contenders(args.only) if contender.name.startswith("ours")]
    results = []
    for ranks, dim, batch, contender in product(args.ranks, args.dim, args.batch, tiled):
        _progress(f"{ranks} ranks, D={dim}, B={batch}, {args.slice} rows: {contender.name}")
        samples = run_ranks(measure_slice, ranks, contender.name, batch, dim, args.scale, args.slice)
        results.append(Result(contender, ranks, batch, dim, [samples]))
        print(f"| {' | '.join(slice_rows(results[-1:], args.slice)[0])} |", flush=True)
        if args.out:
            table = markdown_table(SLICE_HEADER, slice_rows(results, args.slice))
            write_atomic(args.out / "loss_slices.md", f"{machine}\n{table}{SLICE_NOTES}".encode())


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
