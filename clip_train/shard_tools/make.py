"""Pictures and captions to balanced shards, in parallel, in such a way that an interrupted make goes on."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from clip_train.data.files import write_atomic
from clip_train.errors import ConfigError, DataError
from clip_train.shard_tools.damage import Damage, read_damages, write_damages
from clip_train.shard_tools.parallel import Progress, count_workers, run_parallel
from clip_train.shard_tools.parts import CutTask, Part, PartTask, cut_shard, part_path, read_part, write_part
from clip_train.shard_tools.pictures import Resizing
from clip_train.shard_tools.source import Record, TableColumns, read_source

_SAMPLES_PER_PART = 500
_SAMPLES_PER_SHARD = 10_000  # img2dataset's
_MAY_CHANGE = ("output", "max_bad_fraction", "num_workers")  # between an interrupted make and the next


@dataclass(frozen=True)
class MakeOptions:
    """From where to where, and how many in a shard; `clip-shards make --help` explains each.

    Raises:
        ConfigError: a value cannot be used.
    """

    source: str
    output: str
    samples_per_shard: int | None
    num_shards: int | None
    shuffle: bool
    seed: int
    max_bad_fraction: float
    num_workers: Any

    def __post_init__(self) -> None:
        if self.samples_per_shard is not None and self.num_shards is not None:
            raise ConfigError("samples_per_shard and num_shards are both given: one follows from the other")
        for name in ("samples_per_shard", "num_shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is not a whole number of at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} is negative")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction={self.max_bad_fraction} is not between 0 and 1")


@dataclass(frozen=True)
class MadeShards:
    """What a make has written, over all its interruptions."""

    sizes: dict[str, int]
    num_bytes: int
    skipped: list[Damage]


def make_shards(
    options: MakeOptions, columns: TableColumns, resizing: Resizing, on_progress: Progress = lambda *_: None
) -> MadeShards:
    """Write the shards, their `sizes.json` and `NNNNN_stats.json`, and `skipped.csv` if anything was skipped.

    The shards' bytes follow from source and options alone, not from the number of workers or from interruptions.

    Raises:
        ConfigError: a value cannot be used.
        DataError: the source or the output folder cannot be used, or too many records cannot.
    """
    num_workers = count_workers(options.num_workers)
    records = read_source(options.source, columns)
    if options.shuffle:
        order = np.random.Generator(np.random.PCG64(options.seed)).permutation(len(records))
        records = [records[number] for number in order.tolist()]
    settings = asdict(options) | asdict(columns) | asdict(resizing)
    _claim(options.output, {name: value for name, value in settings.items() if name not in _MAY_CHANGE}, records)
    folder = os.path.join(options.output, ".parts")
    if not os.path.exists(os.path.join(options.output, "sizes.json")):  # else an earlier run has finished
        tasks = [
            PartTask(folder, number, records[first : first + _SAMPLES_PER_PART], resizing)
            for number, first in enumerate(range(0, len(records), _SAMPLES_PER_PART))
        ]
        try:
            parts = _write_parts(tasks, options, num_workers, on_progress)
            sizes = _cut_shards(parts, folder, options, num_workers, on_progress)
            write_counts(options.output, sizes)
        except OSError as error:
            remedy = "what is there is whole; mend that and give the same command again"
            raise DataError(
                f"output={options.output} cannot be written: {error.strerror or error}; {remedy}"
            ) from error
    shutil.rmtree(folder, ignore_errors=True)
    return _made(options.output)


def _claim(folder: str, settings: dict[str, Any], records: Sequence[Record]) -> None:
    """Note in the output folder what is made there.

    Raises:
        DataError: the folder holds something else, or cannot be written.
    """
    output, path = Path(folder), Path(folder, "make.json")
    note = {"settings": settings, "num_records": len(records), "records_sha256": _digest(records)}
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(output.glob("*.tar")):
                raise DataError(f"output={output} already holds shards: choose another folder")
            write_atomic(path, json.dumps(note, indent=2).encode())
        found = json.loads(path.read_bytes())
        Path(output, ".parts").mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"output={output} cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} was not written by clip-shards make: choose another output folder") from error
    if found != note:
        changed = [name for name, value in settings.items() if found["settings"].get(name) != value]
        reason = f"there {changed[0]}={found['settings'].get(changed[0])}" if changed else "of other records"
        raise DataError(f"output={output} holds another make ({reason}): choose another folder, or remove it")


def _digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(record).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _write_parts(
    tasks: Sequence[PartTask], options: MakeOptions, num_workers: int, on_progress: Progress
) -> list[Part]:
    """Write the parts that are missing. Stops as soon as it is certain that too many records cannot be used."""
    folder, total = tasks[0].folder, sum(len(task.records) for task in tasks)
    parts = {task.number: part for task in tasks if (part := read_part(folder, task.number))}
    done = sum(len(tasks[number].records) for number in parts)
    missing = [task for task in tasks if task.number not in parts]
    with closing(run_parallel(write_part, missing, num_workers)) as results:
        on_progress("reading pictures", done, total)
        _check_skipped(parts, total, options)
        for part in results:
            parts[part.number] = part
            done += len(tasks[part.number].records)
            on_progress("reading pictures", done, total)
            _check_skipped(parts, total, options)
    skipped = [damage for number in sorted(parts) for damage in parts[number].skipped]
    if skipped:
        write_damages(os.path.join(options.output, "skipped.csv"), skipped)
    return [parts[task.number] for task in tasks]


def _check_skipped(parts: dict[int, Part], total: int, options: MakeOptions) -> None:
    num_skipped = sum(len(part.skipped) for part in parts.values())
    if num_skipped <= options.max_bad_fraction * total and num_skipped < total:
        return
    skipped = [damage for number in sorted(parts) for damage in parts[number].skipped]
    path = os.path.join(options.output, "skipped.csv")
    write_damages(path, skipped)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(damage.kind for damage in skipped).most_common())
    raise DataError(
        f"{num_skipped} of {total} records cannot be used ({kinds}), more than max_bad_fraction="
        f"{options.max_bad_fraction:g}; first: {skipped[0].place or skipped[0].key}: {skipped[0].detail}; all in {path}"
    )


def _cut_shards(
    parts: Sequence[Part], folder: str, options: MakeOptions, num_workers: int, on_progress: Progress
) -> dict[str, int]:
    """Cut the samples of all parts into shards that differ by one sample at most; returns their sizes by name."""
    total = sum(part.num_samples for part in parts)
    num_shards = options.num_shards or -(-total // (options.samples_per_shard or _SAMPLES_PER_SHARD))
    if num_shards > total:
        raise DataError(f"num_shards={num_shards}, but there are only {total} usable samples")
    edges = [total * shard // num_shards for shard in range(num_shards + 1)]
    names = [f"{shard:05d}.tar" for shard in range(num_shards)]
    tasks = [
        CutTask(os.path.join(options.output, name), _ranges(parts, folder, first, last))
        for name, (first, last) in zip(names, pairwise(edges))
    ]
    missing = [task for task in tasks if not os.path.exists(task.shard)]
    shards_of = Counter(path for task in missing for path, _, _ in task.ranges)
    with closing(run_parallel(cut_shard, missing, num_workers)) as results:
        on_progress("writing shards", num_shards - len(missing), num_shards)
        for done, task in enumerate(results, num_shards - len(missing) + 1):
            shards_of.subtract(path for path, _, _ in task.ranges)
            for path in [path for path, _, _ in task.ranges if not shards_of[path]]:
                os.unlink(path)  # so that the parts and the shards never need twice the space
            on_progress("writing shards", done, num_shards)
    return {name: last - first for name, (first, last) in zip(names, pairwise(edges))}


def _ranges(parts: Sequence[Part], folder: str, first: int, last: int) -> list[tuple[str, int, int]]:
    """Where the samples `[first, last)` of all parts lie."""
    ranges, begin = [], 0
    for part in parts:
        low, high = max(first - begin, 0), min(last - begin, part.num_samples)
        if low < high:
            ranges.append((part_path(folder, part.number), part.offsets[low], part.offsets[high]))
        begin += part.num_samples
    return ranges


def write_counts(output: str, sizes: dict[str, int]) -> None:
    """img2dataset's counts per shard, and open_clip's of all, whose presence says that all is there."""
    for name, count in sizes.items():
        counts = {"count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0}
        path = os.path.join(output, f"{Path(name).stem}_stats.json")
        write_atomic(path, json.dumps({**counts, "status_dict": {"success": count}}, indent=2).encode())
    write_atomic(os.path.join(output, "sizes.json"), json.dumps(sizes, indent=2).encode())


def _made(output: str) -> MadeShards:
    sizes = json.loads(Path(output, "sizes.json").read_bytes())
    num_bytes = sum(os.path.getsize(os.path.join(output, name)) for name in sizes)
    return MadeShards(sizes, num_bytes, read_damages(os.path.join(output, "skipped.csv")))
