"""Shards of any place as one list: local ones with their index, remote ones with a count, copied when they are read."""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from clip_train.data.index import ShardIndex, load_index, load_indexes
from clip_train.data.remote import scheme_of
from clip_train.data.shard_counts import remote_counts
from clip_train.data.staging import Stager
from clip_train.errors import DataError

log = logging.getLogger(__name__)

_THREADS = 4
_EPOCHS_AHEAD = 4  # of a set small enough to be staged whole; a small source of a mixture has more than others


@dataclass(frozen=True)
class StagedShard:
    """A remote shard, which is copied to the cache when it is opened."""

    shard: str
    count: int
    stager: Stager

    def open(self) -> tuple[int, ShardIndex]:
        """A descriptor of the copy, which stays while it is open, and its index. Raises DataError."""
        descriptor = self.stager.open(self.shard)
        try:
            return descriptor, _index(self.shard, self.stager)
        except DataError:
            os.close(descriptor)
            raise


def open_shards(
    shards: Sequence[str], stager: Stager, cache_dir: str | None, rank: int = 0, world_size: int = 1
) -> list[ShardIndex | StagedShard]:
    """What a reader needs of each shard before it reads: its index, or how many samples it has.

    Raises:
        DataError: a shard cannot be read, is no tar, is damaged, or holds no samples.
    """
    remote = [shard for shard in shards if scheme_of(shard)]
    local = [shard for shard in shards if not scheme_of(shard)]
    opened: dict[str, ShardIndex | StagedShard] = dict(zip(local, load_indexes(local, cache_dir, rank, world_size)))
    opened.update(zip(remote, _staged_shards(remote, stager)))
    return [opened[shard] for shard in shards]


def _staged_shards(urls: Sequence[str], stager: Stager) -> list[StagedShard]:
    found = remote_counts(urls, stager.cache.cache_dir, stager.retries, stager.timeout) if urls else []
    counts = dict(zip(urls, found))
    unknown = [url for url, count in counts.items() if count is None]
    if unknown:
        log.warning("%d shards have to be fetched to be counted; a sizes.json beside them saves that", len(unknown))
        with ThreadPoolExecutor(_THREADS) as pool:
            counts.update(zip(unknown, pool.map(lambda url: _index(url, stager).num_samples, unknown)))
    return [StagedShard(url, count, stager) for url, count in counts.items() if count is not None]


def _index(url: str, stager: Stager) -> ShardIndex:
    with stager.held(url) as path:
        return load_index(str(path), str(stager.cache.cache_dir))


class ShardsAhead(Protocol):
    """An order of samples that can say which shards come next."""

    lanes: int

    def shards_ahead(self, position: int, batch_size: int, ranks: Sequence[int], world_size: int) -> Iterator[int]: ...


def urls_ahead(
    order: ShardsAhead,
    shard_names: Sequence[str],
    position: int,
    *,
    batch_size: int,
    ranks: Sequence[int],
    world_size: int,
) -> Iterator[str]:
    """The remote shards that these ranks read next, each once, in the order of first need."""
    seen: set[int] = set()
    upcoming = order.shards_ahead(position, batch_size, ranks, world_size)
    for number in islice(upcoming, _EPOCHS_AHEAD * (len(shard_names) + order.lanes)):
        if len(seen) == len(shard_names):
            return
        if number not in seen and scheme_of(shard_names[number]):
            yield shard_names[number]
        seen.add(number)
