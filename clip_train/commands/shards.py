"""clip-shards: make, index, verify, describe and time shards."""

import difflib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from clip_train.commands.program import EXIT_DONE, EXIT_USER_ERROR, run_program
from clip_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from clip_train.shard_tools.damage import Damage
    from clip_train.shard_tools.parallel import Progress

EXIT_DAMAGED, EXIT_INTERRUPTED = 1, 130
_FIRST_KEYS = 3
_USAGE = """\
clip-shards makes, checks and describes WebDataset shards.

usage: clip-shards COMMAND [key=value ...]

commands (clip-shards COMMAND --help shows the keys of each):
  make     pictures with captions, from a table or a folder, into shards
  index    note where each sample lies, so that training begins at once
  verify   decode everything, or a random part, and report what is damaged
  stats    counts, sizes, lengths of captions, duplicates, a sheet of samples, histograms
  bench    how fast this machine reads and decodes the shards, by number of loader workers

examples:
  clip-shards make source=table.csv output=shards image_size=256
  clip-shards index shards='shards/*.tar'
  clip-shards verify shards='shards/{00000..00099}.tar' num_samples=10000
  clip-shards stats shards='a/*.tar::b/*.tar' output=stats
  clip-shards bench shards='shards/*.tar' samples_per_second=5000

Tab completion: eval "$(clip-shards -sc install=bash)"
"""

Options = TypeVar("Options")


def main() -> None:
    """Entry point."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("--help", "-h"):
        print(_USAGE, end="")
        sys.exit(EXIT_DONE)
    if command == "-sc":
        command = _command_to_complete()
        sys.argv.insert(1, command)
    if command not in _COMMANDS:
        near = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_COMMANDS)}"
        print(f"clip-shards: error: {command}: no such command; {hint}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    del sys.argv[1]
    run_program(f"clip-shards {command}", f"shards_{command}", _in_one_line(_COMMANDS[command]))


def _command_to_complete() -> str:
    """Hydra's completion asks with the whole line (`clip-shards make out`) and knows nothing of commands."""
    line = os.environ.get("COMP_LINE")
    if line is None:
        return "make"  # it is being installed, which is the same for all
    words = line.split()
    if len(words) < 2 or words[1] not in _COMMANDS:
        print(" ".join(_COMMANDS))
        sys.exit(EXIT_DONE)
    os.environ["COMP_LINE"] = line.replace(f" {words[1]}", "", 1)
    return words[1]


def typed(kind: type[Options], cfg: DictConfig) -> Options:
    """The dataclass `kind` from the config's keys of the same names; OmegaConf's error if one has the wrong type."""
    own = {field.name: cfg[field.name] for field in fields(kind)}  # type: ignore[arg-type]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), own))  # type: ignore[return-value]


def _make(cfg: DictConfig) -> int:
    from clip_train.data.shard_cache import readable_bytes  # imports stay in here: see program.py
    from clip_train.shard_tools.make import MakeOptions, make_shards
    from clip_train.shard_tools.pictures import Resizing
    from clip_train.shard_tools.source import TableColumns

    options, columns, resizing = typed(MakeOptions, cfg), typed(TableColumns, cfg), typed(Resizing, cfg)
    with _progress() as show:
        made = make_shards(options, columns, resizing, show)
    sizes = sorted(set(made.sizes.values()))
    print(
        f"{len(made.sizes)} shards of {' or '.join(map(str, sizes))} samples in {options.output}: "
        f"{sum(made.sizes.values())} samples, {readable_bytes(made.num_bytes)}"
    )
    if made.skipped:
        _print_damages(made.skipped, sum(made.sizes.values()) + len(made.skipped))
        print(f"skipped {len(made.skipped)}, all listed in {options.output}/skipped.csv")
    return EXIT_DONE


def _index(cfg: DictConfig) -> int:
    import time

    from clip_train.data.shard_cache import readable_bytes
    from clip_train.shard_tools.indexing import build_indexes
    from clip_train.shard_tools.parallel import count_workers

    shards, begin, indexes = _shards(cfg), time.monotonic(), []
    with _progress() as show:
        for index in build_indexes(shards, _cache_dir(cfg), count_workers(cfg.num_workers)):
            indexes.append(index)
            show("indexing shards", len(indexes), len(shards))
    seconds = time.monotonic() - begin
    num_samples, size = sum(index.num_samples for index in indexes), sum(map(os.path.getsize, shards))
    print(f"{len(shards)} shards, {num_samples} samples, {readable_bytes(size)}, {seconds:.1f} s")
    return EXIT_DONE


def _verify(cfg: DictConfig) -> int:
    from clip_train.data.shard_cache import readable_bytes
    from clip_train.shard_tools.damage import write_damages
    from clip_train.shard_tools.parallel import count_workers
    from clip_train.shard_tools.samples import Selection
    from clip_train.shard_tools.verify import verify_shards

    selection, num_workers = typed(Selection, cfg), count_workers(cfg.num_workers)
    with _progress() as show:
        found = verify_shards(_shards(cfg), selection, _cache_dir(cfg), num_workers, show)
    print(
        f"{found.num_shards} shards: decoded {found.num_checked} of {found.num_samples} samples, "
        f"{readable_bytes(found.num_bytes)}"
    )
    if cfg.report is not None:
        write_damages(cfg.report, found.damages)
        print(f"all damage is listed in {cfg.report}")
    if not found.damages:
        print("no damage found")
        return EXIT_DONE
    _print_damages(found.damages, found.num_checked)
    return EXIT_DAMAGED


def _stats(cfg: DictConfig) -> int:
    import json
    from pathlib import Path

    from clip_train.data.files import write_atomic
    from clip_train.shard_tools.parallel import count_workers
    from clip_train.shard_tools.samples import Selection
    from clip_train.shard_tools.sheets import draw_histograms, draw_samples
    from clip_train.shard_tools.stats import measure_shards, summarize

    selection, num_workers, folder = typed(Selection, cfg), count_workers(cfg.num_workers), Path(cfg.output)
    with _progress() as show:
        measured = measure_shards(_shards(cfg), selection, _cache_dir(cfg), num_workers, show)
    summary = summarize(measured)
    title = f"{cfg.shards}: {summary['num_samples']:,} samples in {summary['num_shards']:,} shards"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(
            folder / "stats.json", json.dumps(summary, indent=2, ensure_ascii=False).encode("utf-8", "replace")
        )
        draw_samples(folder / "samples.png", measured.indexes, selection, title)
        draw_histograms(folder / "histograms.png", measured, f"{title}, {summary['num_measured']:,} of them measured")
    except OSError as error:
        raise DataError(f"output={folder} cannot be written: {error.strerror or error}") from error
    _print_summary(summary)
    print(f"{folder}/stats.json, samples.png and histograms.png")
    return EXIT_DONE


def _bench(cfg: DictConfig) -> int:
    from clip_train.shard_tools import bench

    options, numbers = typed(bench.BenchOptions, cfg), bench.numbers_of_workers(_plain(cfg.num_workers))
    shards = _shards(cfg)
    batches = bench.open_batches(shards, options)

    def forget() -> None:
        if cfg.forget:
            bench.forget_files(shards)

    forget()
    reading, sample_bytes = bench.reading_rate(batches, options.seconds)
    print(f"{len(shards)} shards, {len(batches.reader)} samples of {sample_bytes / 1000:.1f} kB on average")
    row = "{:>12} {:>12} {:>9}   {}"
    print(row.format("num_workers", "samples/s", "MB/s", "a worker's time"))
    print(row.format("read only", f"{reading:,.0f}", f"{reading * sample_bytes / 1e6:,.1f}", "in one process"))
    rates = {}
    for num_workers in numbers:
        forget()
        rate = bench.loading_rate(batches, num_workers, options.seconds)
        rates[num_workers] = rate.samples_per_second
        stages = ", ".join(f"{stage} {share:.0%}" for stage, share in rate.stages.items())
        speed = rate.samples_per_second
        print(row.format(num_workers, f"{speed:,.0f}", f"{speed * sample_bytes / 1e6:,.1f}", stages), flush=True)
    suggested = bench.suggest_workers(rates, options.samples_per_second)
    if suggested is None:
        remedy = "more processors, or smaller pictures (clip-shards make image_size=)"
        print(f"none reaches {options.samples_per_second:g} samples/s: {remedy}")
    else:
        print(f"suggested: data.num_workers={suggested}")
    return EXIT_DONE


def _print_summary(summary: dict[str, Any]) -> None:
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


def _print_damages(damages: "Sequence[Damage]", total: int) -> None:
    """Count and share of each kind, the most frequent first, with the first few of it."""
    of_kind: defaultdict[str, list[Damage]] = defaultdict(list)
    for damage in damages:
        of_kind[damage.kind].append(damage)
    for kind, found in sorted(of_kind.items(), key=lambda item: -len(item[1])):
        share = f"{len(found) / total:8.2%}" if found[0].key else ""  # of samples; a shard has no key
        print(f"{kind:<18}{len(found):>8}{share}")
        for damage in found[:_FIRST_KEYS]:
            print(f"    {damage.place} {damage.key}: {damage.detail}" if damage.key else f"    {damage.detail}")


@contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar for each thing that is done, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done)

        yield show


def _shards(cfg: DictConfig) -> list[str]:
    from clip_train.data.remote import scheme_of
    from clip_train.data.shards import expand_shards

    patterns = _plain(cfg.shards)
    shards = expand_shards(patterns if isinstance(patterns, list) else str(patterns), "shards")
    if remote := next((shard for shard in shards if scheme_of(shard)), None):
        raise DataError(f"shards: {remote} is remote; run clip-shards where the shards are, or on a copy")
    return shards


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _cache_dir(cfg: DictConfig) -> str | None:
    return None if cfg.cache_dir is None else str(cfg.cache_dir)


def _in_one_line(task: Callable[[DictConfig], int]) -> Callable[[DictConfig], int]:
    """What may go wrong inside, as errors that `run_program` prints, or as an exit code."""

    def run(cfg: DictConfig) -> int:
        try:
            return task(cfg)
        except MissingMandatoryValue as error:
            raise ConfigError(f"{error.full_key} has no value: give {error.full_key}=...") from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
        except KeyboardInterrupt:
            print("clip-shards: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED

    return run


_COMMANDS = {"make": _make, "index": _index, "verify": _verify, "stats": _stats, "bench": _bench}


if __name__ == "__main__":
    main()
