"""What exact retrieval among many images and captions costs: time of one core, and memory.

    uv run python scripts/bench/retrieval.py --out docs/benchmarks

Random unit vectors, five captions for each image, ranked both ways by `retrieval_ranks`. Time grows with the product of
images, texts and dimension, so that one size tells of others; memory is measured at the full size, with vectors of few
dimensions, which are not counted.
"""

import argparse
import time
from pathlib import Path

from measure import describe_machine, run_ranks
from record import markdown_table
from retrieval_measured import Measured, measure_ranks

from clip_train.data.files import write_atomic

_CAPTIONS = 5
_FULL = 100_000
_HEADER = ("images x texts", "dimension", "processor s", "ns per score", "MiB above the vectors", "MiB of all scores")


def main() -> None:
    args = _arguments()
    sizes = [(images, args.dim) for images in args.images] + [(args.full, args.full_dim)]
    rows, per_score = [], 0.0
    for images, dim in sizes:
        begin = time.monotonic()
        (measured,) = run_ranks(measure_ranks, 1, images, _CAPTIONS, dim)
        print(f"{images:,} images, {dim} dimensions: {time.monotonic() - begin:.0f} s by the clock")
        rows.append(_row(images, dim, measured))
        if dim == args.dim:
            per_score = measured.seconds / (images * images * _CAPTIONS)
    seconds = per_score * args.full * args.full * _CAPTIONS
    machine = "".join(f"- {key}: {value}\n" for key, value in describe_machine(["torch"]).items())
    report = f"{machine}\n{markdown_table(_HEADER, rows)}{_note(args, seconds)}"
    print(report)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out / "retrieval.md", report.encode())


def _row(images: int, dim: int, measured: Measured) -> list[str]:
    scores = images * images * _CAPTIONS
    return [
        f"{images:,} x {images * _CAPTIONS:,}",
        str(dim),
        f"{measured.seconds:.1f}",
        f"{1e9 * measured.seconds / scores:.2f}",
        f"{measured.peak_bytes / 2**20:.0f}",
        f"{4 * scores / 2**20:,.0f}",
    ]


def _note(args: argparse.Namespace, seconds: float) -> str:
    return f"""
Ranks of every image's best caption among all texts, and of every text's image among all images, each score computed
once and none kept. Time is the processor's, of one thread, so that other work on the machine shows little.

{args.full:,} x {args.full * _CAPTIONS:,} at {args.dim} dimensions was not run: at the time per score of the largest
size above it takes {seconds / 60:.0f} minutes of one core, which ranks share. Its memory above the vectors is that of
the last row, which has as many images and texts and was run in full.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=_numbers, default=[5_000, 10_000], help="sizes, by commas (5000,10000)")
    parser.add_argument("--dim", type=int, default=512, help="of the vectors (%(default)s)")
    parser.add_argument("--full", type=int, default=_FULL, help="images of the last row (%(default)s)")
    parser.add_argument("--full-dim", type=int, default=8, help="dimension of its vectors (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write retrieval.md")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
