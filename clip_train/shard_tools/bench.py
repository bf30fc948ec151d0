"""How fast shards are read and decoded here, as training would, by number of loader workers."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clip_train.data.augmentation import Augmentation
from clip_train.data.batches import TrainBatches
from clip_train.data.index import load_indexes
from clip_train.data.loader import BatchStarts, make_loader
from clip_train.data.order import SampleOrder
from clip_train.data.pairs import PairReader
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.errors import ConfigError, DataError
from clip_train.shard_tools.parallel import count_workers

_CONTEXT_LENGTH = 77
_LANES, _WINDOW = 64, 4096  # the defaults of configs/data/shards.yaml
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
    cache_dir: str | None

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


def open_batches(shards: Sequence[str], options: BenchOptions) -> TrainBatches:
    """The stream that training with the default augmentation takes from the shards.

    Raises:
        DataError: a shard is damaged, or has no files under the keys.
    """
    reader = PairReader(load_indexes(shards, options.cache_dir), options.image_key, options.caption_key)
    return TrainBatches(
        reader=reader,
        order=SampleOrder(reader.counts, seed=0, lanes=_LANES, window=_WINDOW),
        augmentation=Augmentation(),
        tokenizer=ClipTokenizer(_CONTEXT_LENGTH),
        image_size=options.image_size,
        batch_size=options.batch_size,
        decode=options.decode,
    )


def forget_files(shards: Sequence[str]) -> None:
    """Ask the system to forget what it keeps of the shards in memory, so that they are read from where they are."""
    for shard in shards:
        descriptor = os.open(shard, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


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
