"""clip-shards: make, index, filter, verify, describe and time shards."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from clip_train.commands.program import EXIT_DONE
from clip_train.commands.shard_reports import BenchTable, print_damages, print_summary, progress
from clip_train.commands.subcommands import run_commands
from clip_train.errors import DataError
from clip_train.typed_config import typed

EXIT_DAMAGED = 1
_USAGE = """\
clip-shards makes, checks and describes WebDataset shards.

usage: clip-shards COMMAND [key=value ...]

commands (clip-shards COMMAND --help shows the keys of each):
  make     pictures with captions, from a table or a folder, into shards
  index    note where each sample lies, so that training begins at once
  subset   new shards with the samples that a list names, such as DataComp's filters
  verify   decode everything, or a random part, and report what is damaged
  stats    counts, sizes, lengths of captions, duplicates, a sheet of samples, histograms
  bench    how fast this machine reads and decodes the shards, by number of loader workers

examples:
  clip-shards make source=table.csv output=shards image_size=256
  clip-shards index shards='shards/*.tar'
  clip-shards subset shards='pool/*.tar' uids=filter.npy output=filtered
  clip-shards verify shards='shards/{00000..00099}.tar' num_samples=10000
  clip-shards stats shards='a/*.tar::b/*.tar' output=stats
  clip-shards bench shards='shards/*.tar' samples_per_second=5000

Tab completion: eval "$(clip-shards -sc install=bash)"
"""


def main() -> None:
    """Entry point."""
    run_commands("clip-shards", "shards", _USAGE, _COMMANDS)


def _make(cfg: DictConfig) -> int:
    from clip_train.data.shard_cache import readable_bytes  # imports stay in here: see program.py
    from clip_train.shard_tools.make import MakeOptions, make_shards
    from clip_train.shard_tools.pictures import Resizing
    from clip_train.shard_tools.source import TableColumns

    options, columns, resizing = typed(MakeOptions, cfg), typed(TableColumns, cfg), typed(Resizing, cfg)
    with progress() as show:
        made = make_shards(options, columns, resizing, show)
    sizes = sorted(set(made.sizes.values()))
    print(
        f"{len(made.sizes)} shards of {' or '.join(map(str, sizes))} samples in {options.output}: "
        f"{sum(made.sizes.values())} samples, {readable_bytes(made.num_bytes)}"
    )
    if made.skipped:
        print_damages(made.skipped, sum(made.sizes.values()) + len(made.skipped))
        print(f"skipped {len(made.skipped)}, all listed in {options.output}/skipped.csv")
    return EXIT_DONE


def _index(cfg: DictConfig) -> int:
    import time

    from clip_train.data.shard_cache import readable_bytes
    from clip_train.shard_tools.access import ShardAccess
    from clip_train.shard_tools.indexing import build_indexes
    from clip_train.shard_tools.parallel import count_workers

    access, begin, indexes = typed(ShardAccess, cfg), time.monotonic(), []
    shards = _shards(cfg)
    with progress() as show:
        for index in build_indexes(shards, access, count_workers(cfg.num_workers)):
            indexes.append(index)
            show("indexing shards", len(indexes), len(shards))
    seconds = time.monotonic() - begin
    num_samples, size = sum(index.num_samples for index in indexes), sum(index.num_bytes for index in indexes)
    print(f"{len(shards)} shards, {num_samples} samples, {readable_bytes(size)}, {seconds:.1f} s")
    return EXIT_DONE


def _subset(cfg: DictConfig) -> int:
    from clip_train.shard_tools.access import ShardAccess
    from clip_train.shard_tools.subset import SubsetOptions, subset_shards

    options = typed(SubsetOptions, cfg)
    with progress() as show:
        report = subset_shards(_shards(cfg), options, typed(ShardAccess, cfg), show)
    print(
        f"{report.num_shards} shards in {options.output}: kept {report.num_kept} of {report.num_samples} samples; "
        f"{report.num_missing} of {report.num_listed} in the list are in none of the shards"
    )
    if report.num_without_uid:
        print(f"{report.num_without_uid} samples have no uid in their .json and were left out")
    return EXIT_DONE


def _verify(cfg: DictConfig) -> int:
    from clip_train.data.shard_cache import readable_bytes
    from clip_train.shard_tools.access import ShardAccess
    from clip_train.shard_tools.damage import write_damages
    from clip_train.shard_tools.parallel import count_workers
    from clip_train.shard_tools.samples import Selection
    from clip_train.shard_tools.verify import verify_shards

    selection, num_workers = typed(Selection, cfg), count_workers(cfg.num_workers)
    with progress() as show:
        found = verify_shards(_shards(cfg), selection, typed(ShardAccess, cfg), num_workers, show)
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
    print_damages(found.damages, found.num_checked)
    return EXIT_DAMAGED


def _stats(cfg: DictConfig) -> int:
    import json
    from pathlib import Path

    from clip_train.data.files import utf8, write_atomic
    from clip_train.shard_tools.access import ShardAccess
    from clip_train.shard_tools.parallel import count_workers
    from clip_train.shard_tools.samples import Selection
    from clip_train.shard_tools.sheets import draw_histograms, draw_samples
    from clip_train.shard_tools.stats import measure_shards, summarize

    selection, num_workers, folder = typed(Selection, cfg), count_workers(cfg.num_workers), Path(cfg.output)
    with progress() as show:
        measured = measure_shards(_shards(cfg), selection, typed(ShardAccess, cfg), num_workers, show)
    summary = summarize(measured)
    title = f"{cfg.shards}: {summary['num_samples']:,} samples in {summary['num_shards']:,} shards"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "stats.json", utf8(json.dumps(summary, indent=2, ensure_ascii=False)))
        draw_samples(folder / "samples.png", measured, selection, title)
        draw_histograms(folder / "histograms.png", measured, f"{title}, {summary['num_measured']:,} of them measured")
    except OSError as error:
        raise DataError(f"output={folder} cannot be written: {error.strerror or error}") from error
    print_summary(summary)
    print(f"{folder}/stats.json, samples.png and histograms.png")
    return EXIT_DONE


def _bench(cfg: DictConfig) -> int:
    from clip_train.shard_tools import bench
    from clip_train.shard_tools.access import ShardAccess

    options, access = typed(bench.BenchOptions, cfg), typed(ShardAccess, cfg)
    numbers = bench.numbers_of_workers(_plain(cfg.num_workers))
    shards = _shards(cfg)
    fetched = bench.fetch(shards, access, options.seconds)
    batches = bench.open_batches(fetched.shards, options, access)

    def forget() -> None:
        if cfg.forget:
            bench.forget_files(fetched.shards, access)

    forget()
    reading, sample_bytes = bench.reading_rate(batches, options.seconds)
    of = f" of {len(shards)}" if len(fetched.shards) < len(shards) else ""
    print(f"{len(fetched.shards)}{of} shards, {len(batches.reader)} samples of {sample_bytes / 1000:.1f} kB on average")
    table = BenchTable(sample_bytes)
    table.downloads(fetched)
    table.reading(reading)
    rates = {}
    for num_workers in numbers:
        forget()
        rate = bench.loading_rate(batches, num_workers, options.seconds)
        rates[num_workers] = rate.samples_per_second
        table.loading(num_workers, rate)
    suggested = bench.suggest_workers(rates, options.samples_per_second)
    if suggested is None:
        remedy = "more processors, or smaller pictures (clip-shards make image_size=)"
        print(f"none reaches {options.samples_per_second:g} samples/s: {remedy}")
    else:
        print(f"suggested: data.num_workers={suggested}")
    return EXIT_DONE


def _shards(cfg: DictConfig) -> list[str]:
    from clip_train.data.shards import expand_shards

    patterns = _plain(cfg.shards)
    return expand_shards(patterns if isinstance(patterns, list) else str(patterns), "shards")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


_COMMANDS = {"make": _make, "index": _index, "subset": _subset, "verify": _verify, "stats": _stats, "bench": _bench}


if __name__ == "__main__":
    main()
