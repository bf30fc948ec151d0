"""How fast shards are read and decoded here, as training would, by number of loader workers."""

import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from clip_train.data.augmentation import Augmentation
from clip_train.data.batches import TrainBatches
from clip_train.data.loader import BatchStarts, make_loader
from clip_train.data.order import SampleOrder
from clip_train.data.pairs import PairReader
from clip_train.data.remote import scheme_of
from clip_train.data.remote_shards import open_shards
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.errors import ConfigError, DataError
from clip_train.shard_tools.access import ShardAccess
from clip_train.shard_tools.parallel import count_workers

_CONTEXT_LENGTH = 77
_LANES, _WINDOW = 64, 4096  # the defaults of configs/data/shards.yaml
_DOWNLOADS_AT_ONCE = 4  # as the stager beside training
_NEARLY_BEST = 0.95


@dataclass(frozen=True)
class BenchOptions:
    """What is loaded, for how long each measurement lasts in seconds, and the rate that is wanted.

    Raises:
        ConfigError: a value cannot be used.
    """

    image_key: str
    caption_key: Any
    image_size: int
    batch_size: int
    decode: str
    seconds: float
    samples_per_second: float | None

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not a whole number of at least 1")
        if not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds:g} is not above 0")
        if self.decode not in ("fast", "exact"):
            raise ConfigError(f"decode={self.decode} is none of fast, exact")


class Rate(NamedTuple):
    """What was measured: samples per second, and the share of a worker's time that each stage takes."""

    samples_per_second: float
    stages: Mapping[str, float]


class Fetched(NamedTuple):
    """Shards that can be read at once, and what it took to copy those of them that were not here."""

    shards: list[str]
    num_downloads: int
    num_bytes: int
    seconds: float


def fetch(shards: Sequence[str], access: ShardAccess, seconds: float) -> Fetched:
    """Copy remote shards, several at once as training does, for so long or until the cache is half full.

    Returns:
        The local shards, and the remote ones whose copies are here now, at least one.

    Raises:
        DataError: a shard cannot be fetched.
    """
    stager = access.stager
    waiting = deque(shard for shard in shards if scheme_of(shard))
    missing = {url for url in waiting if stager.cache.size(url) is None}
    sizes: dict[str, int] = {}
    begin = time.monotonic()

    def work() -> None:
        while waiting and (
            not sizes or (time.monotonic() < begin + seconds and sum(sizes.values()) < stager.cache.max_bytes // 2)
        ):
            url = waiting.popleft()
            stager.stage(url)
            sizes[url] = stager.cache.size(url) or 0

    with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        for done in [pool.submit(work) for _ in range(_DOWNLOADS_AT_ONCE)]:
            done.result()
    new = [size for url, size in sizes.items() if url in missing]
    here = [shard for shard in shards if shard in sizes or not scheme_of(shard)]
    return Fetched(here, len(new), sum(new), time.monotonic() - begin)


def open_batches(shards: Sequence[str], options: BenchOptions, access: ShardAccess) -> TrainBatches:
    """The stream that training with the default augmentation takes from the shards.

    Raises:
        DataError: a shard is damaged, or has no files under the keys.
    """
    opened = open_shards(shards, access.stager, access.cache_dir)
    reader = PairReader(opened, options.image_key, options.caption_key)
    order = SampleOrder(reader.counts, seed=0, lanes=_LANES, window=_WINDOW)
    reader.keep_open(order.shards_at_once())
    return TrainBatches(
        reader=reader,
        order=order,
        augmentation=Augmentation(),
        tokenizer=ClipTokenizer(_CONTEXT_LENGTH),
        image_size=options.image_size,
        batch_size=options.batch_size,
        decode=options.decode,
    )


def forget_files(shards: Sequence[str], access: ShardAccess) -> None:
    """Ask the system to forget what it keeps of the shards in memory, so that they are read from where they are."""
    for shard in shards:
        with access.local(shard) as path, open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading_rate(batches: TrainBatches, seconds: float) -> tuple[float, float]:
    """Samples per second that one process reads in training's order, without decoding, and bytes per sample."""
    num_samples, num_bytes, start = 0, 0, 0
    begin = time.monotonic()
    while time.monotonic() < begin + seconds:
        positions = batches.order.rank_positions(start, batches.batch_size, 0, 1)
        located = list(zip(*(numbers.tolist() for numbers in batches.order.locate(positions))))
        batches.reader.will_need(located)
        for shard, sample in located:
            pair = batches.reader.read(shard, sample)
            num_bytes += len(pair.image) + sum(map(len, pair.files.values()))
        num_samples += len(located)
        start += batches.batch_size
    return num_samples / (time.monotonic() - begin), num_bytes / num_samples


def loading_rate(batches: TrainBatches, num_workers: int, seconds: float) -> Rate:
    """Load batches for so long, after each worker has begun.

    Raises:
        DataError: samples cannot be used.
    """
    loaded = _load(batches, num_workers)
    for _ in range(num_workers + 1):
        next(loaded)
    num_batches, stages = 0, Counter()
    begin = now = time.monotonic()
    while now < begin + seconds:
        stages.update(next(loaded))
        num_batches += 1
        now = time.monotonic()
    total = sum(stages.values())
    shares = {stage: spent / total for stage, spent in stages.most_common()}
    return Rate(num_batches * batches.batch_size / (now - begin), shares)


def _load(batches: TrainBatches, num_workers: int) -> Iterator[Mapping[str, float]]:
    """The seconds of each stage, batch by batch."""
    for batch in make_loader(batches, BatchStarts(0, batches.batch_size), num_workers):
        if batch["error"]:
            raise DataError(f"{batch['error']} (clip-shards verify lists all damage)")
        yield batch["seconds"]


def numbers_of_workers(setting: Any) -> list[int]:
    """`auto` is 0, 1, 2, 4 and so on up to the number of processors; else a list of numbers, or one.

    Raises:
        ConfigError: it is none of these.
    """
    if setting == "auto":
        most = count_workers("auto")
        return sorted({0, most, *(2**power for power in range(most.bit_length()))})
    numbers = setting if isinstance(setting, list) else [setting]
    if not numbers or any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in numbers):
        raise ConfigError(f"num_workers={setting} is neither auto nor a list of whole numbers such as [0,4,8]")
    return numbers


def suggest_workers(rates: Mapping[int, float], target: float | None) -> int | None:
    """The fewest workers that reach the target; None if none does. Without a target, that are nearly the fastest.

    No workers at all are only suggested if nothing else was measured: the model would wait for each batch.

    Args:
        rates: samples per second by number of workers.
        target: samples per second.
    """
    beside = {workers: rate for workers, rate in rates.items() if workers} or rates
    wanted = _NEARLY_BEST * max(beside.values()) if target is None else target
    return min((workers for workers, rate in beside.items() if rate >= wanted), default=None)
