"""Shards wherever they are: local ones in their place, remote ones through the cache that training has, too."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from clip_train.data.files import user_cache
from clip_train.data.index import ShardIndex, load_index
from clip_train.data.remote import scheme_of
from clip_train.data.shard_cache import parse_bytes
from clip_train.data.staging import Stager
from clip_train.errors import ConfigError, DataError


@dataclass(frozen=True)
class ShardAccess:
    """The settings of the `data` group that say where indexes and copies go, and how copies are fetched.

    Attributes:
        cache_dir: folder of indexes and copies. None keeps the indexes of local shards beside them, and what belongs
            to remote ones in the user's cache.
        cache_size: limit of all copies together, as `200GB`.
        retries: how often a download that failed is gone on with.
        timeout: seconds without a byte after which it has failed.

    Raises:
        ConfigError: a value cannot be used.
    """

    cache_dir: str | None
    cache_size: Any
    retries: int
    timeout: float

    def __post_init__(self) -> None:
        parse_bytes(self.cache_size, "cache_size")
        if self.retries < 0 or not self.timeout > 0:
            raise ConfigError(f"retries={self.retries} is negative, or timeout={self.timeout:g} is not above 0")

    @cached_property
    def stager(self) -> Stager:
        """Makes the copies."""
        return self.make_stager()

    def make_stager(self, group: str = "") -> Stager:
        """One that names its settings as keys of that group of the config, as `data.`, in errors."""
        cache_size = parse_bytes(self.cache_size, f"{group}cache_size")
        return Stager(self.cache_dir or user_cache(), cache_size, self.retries, self.timeout, group)

    @contextmanager
    def local(self, shard: str) -> Iterator[str]:
        """A path under which the shard can be read inside: its own, or that of its copy, made if there is none.

        A DataError from inside names the shard as it was given.

        Raises:
            DataError: it cannot be fetched.
        """
        if not scheme_of(shard):
            yield shard
            return
        with self.stager.held(shard) as path:
            try:
                yield str(path)
            except DataError as error:  # who reads the message knows the shard, not its copy
                raise DataError(str(error).replace(str(path), shard)) from error

    def index(self, shard: str) -> ShardIndex:
        """The shard's index, under the name that was given.

        Raises:
            DataError: the shard cannot be fetched or read, is no tar, is damaged, or holds no samples.
        """
        cache_dir = str(self.stager.cache.cache_dir) if scheme_of(shard) else self.cache_dir
        with self.local(shard) as path:
            return replace(load_index(path, cache_dir), shard=shard)
