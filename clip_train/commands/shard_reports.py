"""What `clip-shards` shows: a bar for each thing that is done, and what was found."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imports stay inside the functions: see program.py
    from clip_train.shard_tools.bench import Fetched, Rate
    from clip_train.shard_tools.damage import Damage
    from clip_train.shard_tools.parallel import Progress

_FIRST_KEYS = 3
_BENCH_ROW = "{:>12} {:>12} {:>9}   {}"


@contextmanager
def progress() -> "Iterator[Progress]":
    """A bar for each thing that is done, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        bars = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = bar.add_task(what, total=total)
            bar.update(bars[what], completed=done)

        yield show


def print_damages(damages: "Sequence[Damage]", total: int) -> None:
    """Count and share of each kind, the most frequent first, with the first few of it."""
    of_kind: defaultdict[str, list[Damage]] = defaultdict(list)
    for damage in damages:
        of_kind[damage.kind].append(damage)
    for kind, found in sorted(of_kind.items(), key=lambda item: -len(item[1])):
        share = f"{len(found) / total:8.2%}" if found[0].key else ""  # of samples; a shard has no key
        print(f"{kind:<18}{len(found):>8}{share}")
        for damage in found[:_FIRST_KEYS]:
            print(f"    {damage.place} {damage.key}: {damage.detail}" if damage.key else f"    {damage.detail}")


def print_summary(summary: Mapping[str, Any]) -> None:
    """What `clip-shards stats` writes to stats.json, for people."""
    from rich.console import Console
    from rich.table import Table

    from clip_train.data.shard_cache import readable_bytes

    print(
        f"{summary['num_shards']} shards, {summary['num_samples']} samples, {readable_bytes(summary['shard_bytes'])}; "
        f"measured {summary['num_measured']}, of which {summary['num_without_image']} have no readable picture and "
        f"{summary['num_without_caption']} no caption"
    )
    if (download := summary["download"]) and download["successes"] < download["count"]:
        share = download["successes"] / download["count"]
        print(f"img2dataset notes: {download['successes']} of {download['count']} downloaded ({share:.1%})")
    columns = ("mean", "min", "p5", "median", "p95", "max")
    table = Table("", *columns, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    names = ("samples_per_shard", "image_bytes", "image_width", "image_height", "aspect_ratio")
    for name in (*names, "caption_words", "caption_tokens"):
        if summary[name]:
            table.add_row(name.replace("_", " "), *(f"{summary[name][column]:,.4g}" for column in columns))
    Console().print(table)
    print(
        f"captions over {summary['context_length']} tokens: {summary['over_context_length_fraction']:.2%}; "
        f"captions that occur more than once among those measured: {summary['duplicate_caption_fraction']:.2%}"
    )


class BenchTable:
    """The rows of `clip-shards bench`, as they are measured."""

    def __init__(self, sample_bytes: float) -> None:
        self.sample_bytes = sample_bytes
        print(_BENCH_ROW.format("num_workers", "samples/s", "MB/s", "a worker's time"))

    def downloads(self, fetched: "Fetched") -> None:
        """How fast remote shards came, if any had to."""
        if fetched.num_downloads:
            speed = fetched.num_bytes / fetched.seconds
            self._row("download", speed / self.sample_bytes, f"{fetched.num_downloads} shards, four at once", speed)

    def reading(self, samples_per_second: float) -> None:
        """Of one process that decodes nothing."""
        self._row("read only", samples_per_second, "in one process")

    def loading(self, num_workers: int, rate: "Rate") -> None:
        """Of as many loader workers."""
        stages = ", ".join(f"{stage} {share:.0%}" for stage, share in rate.stages.items())
        self._row(num_workers, rate.samples_per_second, stages)

    def _row(self, name: object, samples_per_second: float, about: str, bytes_per_second: float | None = None) -> None:
        megabytes = (bytes_per_second or samples_per_second * self.sample_bytes) / 1e6
        print(_BENCH_ROW.format(name, f"{samples_per_second:,.0f}", f"{megabytes:,.1f}", about), flush=True)
