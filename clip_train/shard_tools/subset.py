"""New shards with those samples that a list names, in parallel, in such a way that an interrupted subset goes on.

First every shard is looked through, and what is to be kept of it noted in `.parts/`; then the new shards are written,
equally large whatever share of a shard is kept. What they hold follows from the shards and the list alone.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.writer import TarWriter

from clip_train.data.files import whole_file, write_atomic
from clip_train.data.index import ABSENT
from clip_train.errors import ConfigError, DataError
from clip_train.shard_tools.access import ShardAccess
from clip_train.shard_tools.make import write_counts
from clip_train.shard_tools.parallel import Progress, count_workers, run_parallel
from clip_train.shard_tools.samples import sample_key
from clip_train.shard_tools.uid_list import find_in_list, key_number, open_list, prepare_list, uid_number

_NOTE = "subset.json"


@dataclass(frozen=True)
class SubsetOptions:
    """Which samples, and where to; `clip-shards subset --help` explains each.

    Raises:
        ConfigError: a value cannot be used.
    """

    output: str
    uids: str | None
    keys: str | None
    samples_per_shard: int
    num_workers: Any

    def __post_init__(self) -> None:
        if (self.uids is None) == (self.keys is None):
            raise ConfigError("give exactly one of uids= and keys=: the list of samples to keep")
        if self.samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard={self.samples_per_shard} is not a whole number of at least 1")

    @property
    def list_setting(self) -> str:
        """The key that has the list."""
        return "uids" if self.uids is not None else "keys"


@dataclass(frozen=True)
class SubsetReport:
    """What became of the samples; `report.json` in the output folder.

    Attributes:
        num_samples: in the shards.
        num_kept: samples written; one that the list names twice is written twice.
        num_without_uid: samples whose .json names no uid, which were left out.
        num_listed: entries of the list.
        num_missing: entries of the list that are in none of the shards.
        num_shards: shards written.
    """

    num_samples: int
    num_kept: int
    num_without_uid: int
    num_listed: int
    num_missing: int
    num_shards: int


@dataclass(frozen=True)
class SelectTask:
    """A shard to look through, and where to note what is kept of it."""

    shard: str
    notes: str
    list_setting: str
    list_path: str
    access: ShardAccess


@dataclass(frozen=True)
class Chosen:
    """How many samples a shard has, how many of them no uid, and how many are kept."""

    num_samples: int
    num_without_uid: int
    num_kept: int


@dataclass(frozen=True)
class WriteTask:
    """A new shard as parts of old ones: (shard, its notes, first and last of what is kept of it)."""

    shard: str
    parts: Sequence[tuple[str, str, int, int]]
    access: ShardAccess


def subset_shards(
    shards: Sequence[str], options: SubsetOptions, access: ShardAccess, on_progress: Progress = lambda *_: None
) -> SubsetReport:
    """Write the shards, their `sizes.json` and `NNNNN_stats.json`, and the report.

    Raises:
        ConfigError: a value cannot be used.
        DataError: the list, a shard or the output folder cannot be used, or the list names no sample of the shards.
    """
    num_workers = count_workers(options.num_workers)
    output, parts = options.output, os.path.join(options.output, ".parts")
    report = Path(output, "report.json")
    try:
        note = _check_free(shards, options)
        if not os.path.exists(os.path.join(output, "sizes.json")):  # else an earlier run has finished
            os.makedirs(parts, exist_ok=True)
            setting = options.list_setting
            list_path = prepare_list(setting, str(options.uids or options.keys), parts)
            write_atomic(Path(output, _NOTE), json.dumps(note, indent=2).encode())
            tasks = [
                SelectTask(shard, os.path.join(parts, f"{number:06d}"), setting, list_path, access)
                for number, shard in enumerate(shards)
            ]
            chosen = _select(tasks, num_workers, on_progress)
            sizes = _write(tasks, chosen, options, num_workers, on_progress)
            write_atomic(report, json.dumps(asdict(_report(tasks, chosen, len(sizes))), indent=2).encode())
            write_counts(output, sizes)
    except OSError as error:
        remedy = "what is there is whole; mend that and give the same command again"
        raise DataError(f"output={output} cannot be written: {error.strerror or error}; {remedy}") from error
    shutil.rmtree(parts, ignore_errors=True)
    return SubsetReport(**json.loads(report.read_bytes()))


def _check_free(shards: Sequence[str], options: SubsetOptions) -> dict[str, Any]:
    """What to note in the output folder. Raises DataError if something else is noted there."""
    output, source = Path(options.output), str(options.uids or options.keys)
    status = os.stat(source) if os.path.exists(source) else None
    note = {
        options.list_setting: source,
        "list_size": status.st_size if status else None,
        "list_time_ns": status.st_mtime_ns if status else None,
        "samples_per_shard": options.samples_per_shard,
        "num_shards": len(shards),
        "shards_sha256": hashlib.sha256("\n".join(shards).encode("utf-8", "surrogateescape")).hexdigest(),
    }
    path = output / _NOTE
    if not path.exists():
        if any(output.glob("*.tar")):
            raise DataError(f"output={output} already holds shards: choose another folder")
        return note
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} was not written by clip-shards subset: choose another output folder") from error
    if changed := [name for name, value in note.items() if found.get(name) != value]:
        reason = f"there {changed[0]} is {found.get(changed[0])}"
        raise DataError(f"output={output} holds another subset ({reason}): choose another folder, or remove it")
    return note


def _select(tasks: Sequence[SelectTask], num_workers: int, on_progress: Progress) -> list[Chosen]:
    chosen = {task.notes: noted for task in tasks if (noted := _noted(task.notes))}
    with closing(run_parallel(select_samples, [t for t in tasks if t.notes not in chosen], num_workers)) as results:
        on_progress("looking through shards", len(chosen), len(tasks))
        for notes, noted in results:
            chosen[notes] = noted
            on_progress("looking through shards", len(chosen), len(tasks))
    return [chosen[task.notes] for task in tasks]


def _noted(notes: str) -> Chosen | None:
    try:
        return Chosen(**json.loads(Path(f"{notes}.json").read_bytes()))
    except FileNotFoundError:
        return None


def select_samples(task: SelectTask) -> tuple[str, Chosen]:
    """Note which samples of a shard are kept: pairs of row and entry of the list, in the order of the shard."""
    numbers = list(_sample_numbers(task))
    with_number = [row for row, number in enumerate(numbers) if number is not None]
    entries = find_in_list(open_list(task.list_path), (n for n in numbers if n is not None))
    kept = [(row, entry) for row, (first, end) in zip(with_number, entries) for entry in range(first, end)]
    with whole_file(f"{task.notes}.npy") as file:
        np.save(file, np.array(kept, dtype=np.int64).reshape(-1, 2))
    chosen = Chosen(len(numbers), len(numbers) - len(with_number), len(kept))
    write_atomic(f"{task.notes}.json", json.dumps(asdict(chosen)).encode())
    return task.notes, chosen


def _sample_numbers(task: SelectTask) -> Iterator[int | None]:
    """What stands in the list for each sample of the shard, if it is there; None for one without uid."""
    index = task.access.index(task.shard)
    extents = index.read_extents()
    json_files = index.extensions.index("json") if "json" in index.extensions else None
    with task.access.local(task.shard) as path, open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        for sample in extents:
            if task.list_setting == "keys":
                offsets = sample[:, 0]
                yield key_number(sample_key(descriptor, int(offsets[offsets != ABSENT].min())))
            elif json_files is None or sample[json_files, 0] == ABSENT:
                yield None
            else:
                offset, size = sample[json_files].tolist()
                yield _uid_of(os.pread(descriptor, size, offset))


def _uid_of(content: bytes) -> int | None:
    try:
        about = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return uid_number(about.get("uid")) if isinstance(about, dict) else None


def _write(
    tasks: Sequence[SelectTask],
    chosen: Sequence[Chosen],
    options: SubsetOptions,
    num_workers: int,
    on_progress: Progress,
) -> dict[str, int]:
    """Write the shards that are missing; returns the sizes of all by name."""
    ends = np.cumsum([noted.num_kept for noted in chosen])
    total = int(ends[-1])
    num_samples = sum(noted.num_samples for noted in chosen)
    if num_samples == sum(noted.num_without_uid for noted in chosen):
        raise DataError(
            f"none of the {num_samples:,} samples has a uid in its .json, as DataComp's have: give keys=, a list of"
            " names"
        )
    if not total:
        raise DataError(
            f"{options.list_setting}={options.uids or options.keys} names none of the {num_samples:,} samples of these"
            " shards"
        )
    num_shards = -(-total // options.samples_per_shard)
    edges = [total * shard // num_shards for shard in range(num_shards + 1)]
    sizes = {f"{number:05d}.tar": last - first for number, (first, last) in enumerate(pairwise(edges))}
    missing = []
    for name, (first, last) in zip(sizes, pairwise(edges)):
        path = os.path.join(options.output, name)
        if not os.path.exists(path):
            missing.append(WriteTask(path, _parts(tasks, ends, first, last), tasks[0].access))
    with closing(run_parallel(write_shard, missing, num_workers)) as results:
        on_progress("writing shards", num_shards - len(missing), num_shards)
        for done, _ in enumerate(results, num_shards - len(missing) + 1):
            on_progress("writing shards", done, num_shards)
    return sizes


def _parts(tasks: Sequence[SelectTask], ends: np.ndarray, first: int, last: int) -> list[tuple[str, str, int, int]]:
    """Where the kept samples `[first, last)` of all shards lie."""
    parts = []
    number = int(np.searchsorted(ends, first, "right"))
    while number < len(tasks) and (begin := int(ends[number - 1]) if number else 0) < last:
        low, high = max(first - begin, 0), min(last, int(ends[number])) - begin
        if low < high:
            parts.append((tasks[number].shard, tasks[number].notes, low, high))
        number += 1
    return parts


def write_shard(task: WriteTask) -> str:
    """Write one new shard, with the samples' files and names as they were; one that is there already gets a _."""
    names: set[str] = set()
    with whole_file(task.shard) as target, TarWriter(target, encoder=False, mtime=0) as writer:
        for shard, notes, low, high in task.parts:
            rows = np.load(f"{notes}.npy", mmap_mode="r")[low:high, 0]
            for key, files in _read_samples(shard, rows.tolist(), task.access):
                name = key
                while name in names:
                    name += "_"
                names.add(name)
                writer.write({"__key__": name, **files})
    return task.shard


def _read_samples(shard: str, rows: Sequence[int], access: ShardAccess) -> Iterator[tuple[str, dict[str, bytes]]]:
    index = access.index(shard)
    extents = index.read_extents()
    with access.local(shard) as path, open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        for row in rows:
            there = [
                (name, *extent) for name, extent in zip(index.extensions, extents[row].tolist()) if extent[0] != ABSENT
            ]
            key = sample_key(descriptor, min(offset for _, offset, _ in there))
            yield key, {name: os.pread(descriptor, size, offset) for name, offset, size in there}


def _report(tasks: Sequence[SelectTask], chosen: Sequence[Chosen], num_shards: int) -> SubsetReport:
    found = np.zeros(len(open_list(tasks[0].list_path)), dtype=bool)
    for task, noted in zip(tasks, chosen):
        if noted.num_kept:
            found[np.load(f"{task.notes}.npy", mmap_mode="r")[:, 1]] = True
    return SubsetReport(
        num_samples=sum(noted.num_samples for noted in chosen),
        num_kept=sum(noted.num_kept for noted in chosen),
        num_without_uid=sum(noted.num_without_uid for noted in chosen),
        num_listed=len(found),
        num_missing=len(found) - int(found.sum()),
        num_shards=num_shards,
    )
