"""What it costs to know which samples come next: 400 million samples in 40,000 shards that exist in numbers only.

    uv run python scripts/bench/order.py --out runs/bench

For the plain order and for a mixture of two sources, and for the first of 1, 8 and 64 ranks: time per sample that the
rank loads, over consecutive batches; time of the first batch of a resumed run; what Python and numpy had allocated at
most; and the time to name one more of the shards ahead, of 10,000 samples each.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from measure import describe_machine
from record import markdown_table

from clip_train.data.files import write_atomic
from clip_train.data.keyed_random import keyed_bits
from clip_train.data.mixture import Mixture
from clip_train.data.order import SampleOrder

_SHARDS, _SAMPLES_PER_SHARD = 40_000, 10_000
_COLD_STARTS = 5
_SHARDS_AHEAD = 200
_HEADER = ("stream", "batch", "ranks", "us per sample", "first batch ms", "memory MiB", "ms per shard ahead")
_NOTE = f"""
{_SHARDS * _SAMPLES_PER_SHARD:,} samples in {_SHARDS:,} shards, 64 lanes, windows of 4,096 samples.
Time is the processor's, of one thread: per sample that the first rank loads, for the first batch of a resumed run, and
to name one more of the shards ahead ({_SAMPLES_PER_SHARD:,} samples each). Memory is what Python and numpy had
allocated at most.
"""

Stream = SampleOrder | Mixture


def main() -> None:
    args = _arguments()
    machine = "".join(f"- {key}: {value}\n" for key, value in describe_machine(["numpy"]).items())
    machine += f"- consecutive batches: {args.batches}\n"
    rows = [
        _measured(name, make, batch, world_size, args.batches)
        for batch in args.batch
        for name, make in (("one source", _one_source), ("mixture of two", _two_sources))
        for world_size in (1, 8, 64)
    ]
    report = f"{machine}\n{markdown_table(_HEADER, rows)}{_NOTE}"
    print(report)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out / "order.md", report.encode())


def _one_source() -> Stream:
    return SampleOrder(np.full(_SHARDS, _SAMPLES_PER_SHARD), seed=0)


def _two_sources() -> Stream:
    parts = {"large": 3 * _SHARDS // 4, "small": _SHARDS // 4}
    counts = {name: np.full(shards, _SAMPLES_PER_SHARD) for name, shards in parts.items()}
    return Mixture(counts, {"large": 0.6, "small": 0.4}, seed=0)


def _measured(name: str, make: Callable[[], Stream], batch: int, world_size: int, batches: int) -> list[str]:
    samples = batches * batch // world_size
    starts = [int(bits % 10**9) // batch * batch for bits in keyed_bits(0, count=_COLD_STARTS)]
    cold = statistics.median(_seconds(lambda s=s: _load(make(), s, 1, batch, world_size)) for s in starts)
    stream = make()
    _load(stream, 0, 1, batch, world_size)
    warm = _seconds(lambda: _load(stream, batch, batches, batch, world_size)) / samples
    shards = stream.shards_ahead(0, batch, [0], world_size)
    _look_ahead(shards)  # those of the first batch come at once
    ahead = _seconds(lambda: _look_ahead(shards)) / _SHARDS_AHEAD
    memory = _peak_bytes(lambda: _load(make(), starts[0], max(1, 2**19 // batch), batch, world_size))
    figures = [f"{warm * 1e6:.2f}", f"{cold * 1e3:.1f}", f"{memory / 2**20:.1f}", f"{ahead * 1e3:.1f}"]
    return [name, f"{batch:,}", str(world_size), *figures]


def _load(stream: Stream, start: int, batches: int, batch: int, world_size: int) -> None:
    for first in range(start, start + batches * batch, batch):
        stream.locate(stream.rank_positions(first, batch, 0, world_size))


def _look_ahead(ahead: Iterator[int]) -> None:
    for _ in range(_SHARDS_AHEAD):
        next(ahead)


def _seconds(function: Callable[[], None]) -> float:
    """Of processor time, so that other work on the machine does not show."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def _peak_bytes(function: Callable[[], None]) -> int:
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=_numbers, default=[4096, 65536], help="pairs per step, by commas (4096,65536)")
    parser.add_argument("--batches", type=int, default=1000, help="how many in a row (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write order.md")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
