"""Downloads of whole remote shards into the local cache: retried, resumed, counted."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from clip_train.data.remote import RemoteStream, open_remote
from clip_train.data.retries import Cancelled, never, wait, with_retries
from clip_train.data.shard_cache import CacheError, Part, ShardCache, readable_bytes
from clip_train.heartbeat import beat

_CHECK_EVERY = 256 << 20  # bytes between looks at the limit, where a file's size is not known beforehand
_T = TypeVar("_T")


class Stager:
    """Makes local copies of remote shards. May be pickled, forked, and used from several threads.

    Args:
        cache_dir: copies go to its subfolder `staged`. A local disk, which several jobs may share.
        max_bytes: limit of all copies together; least recently used ones that nobody has open are deleted for new ones.
        retries: how often a download that failed is gone on with before the error is raised.
        timeout: seconds without a byte after which a download has failed.
        group: of the program's config that has `cache_dir`, as `data.`; for messages.
    """

    def __init__(
        self, cache_dir: str | Path, max_bytes: int, retries: int = 10, timeout: float = 60.0, group: str = ""
    ) -> None:
        self.cache = ShardCache(cache_dir, max_bytes, group)
        self.retries, self.timeout = retries, timeout
        self._retried: list[int] = []  # the process, for each time; what a fork inherits is its parent's to tell

    def take_retries(self) -> int:
        """How often this process had to go on with a download since it last asked."""
        taken = 0
        while self._retried:
            taken += self._retried.pop() == os.getpid()
        return taken

    def path(self, url: str) -> Path:
        """Where `url`'s copy is, or would be."""
        return self.cache.path(url)

    def stage(self, url: str, cancelled: Callable[[], bool] = never) -> Path:
        """Return a whole local copy of `url`, downloaded if there is none.

        If another process or thread is at it, wait for that one. A copy that exists is not compared with the remote
        file: shards do not change.

        Raises:
            DataError: the file does not exist, access is denied, it is larger than the limit, the disk is full, or it
                failed more than `retries` times. The message names the URL.
            Cancelled: `cancelled()` became true.
        """
        path = self.path(url)
        if self.cache.touch(url):
            return path
        with self.cache.part(url, wait=lambda seconds: wait(seconds, cancelled)) as part:
            if self.cache.touch(url):  # it came while waiting
                part.discard()
            else:
                modified = self._download(url, part, cancelled)
                self._on_disk(lambda: part.finish(path, modified))
                self.cache.evict()  # the lock of `part` keeps the new copy
        return path

    def open(self, url: str) -> int:
        """A descriptor of `url`'s copy, which is not evicted until the descriptor is closed. Raises as `stage` does."""
        while True:
            self.stage(url, cancelled=_beating)
            if (descriptor := self.cache.acquire(url)) is not None:
                return descriptor

    @contextmanager
    def held(self, url: str) -> Iterator[Path]:
        """`url`'s copy, which is not evicted inside. Raises as `stage` does."""
        descriptor = self.open(url)
        try:
            yield self.path(url)
        finally:
            os.close(descriptor)

    def _download(self, url: str, part: Part, cancelled: Callable[[], bool]) -> float | None:
        """Fill `part`, in several attempts if need be; returns the remote file's time."""

        def attempt() -> float | None:
            with open_remote(url, self.timeout, *part.resumable()) as stream:
                self._transfer(url, part, stream, cancelled)
                return stream.modified

        return with_retries(attempt, f"shard {url}", self.retries, cancelled, lambda: self._retried.append(os.getpid()))

    def _transfer(self, url: str, part: Part, stream: RemoteStream, cancelled: Callable[[], bool]) -> None:
        """One attempt: write the bytes that are missing."""
        self._check_limit(url, stream.size or 0)
        self._on_disk(lambda: part.begin(stream.start, stream.size, stream.version))
        self.cache.evict()
        next_check = part.size + _CHECK_EVERY
        for chunk in stream.chunks:
            if cancelled():
                raise Cancelled(url)
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._on_disk(lambda rest=rest: part.write(rest)) :]
            if stream.size is None:
                self._check_limit(url, part.size)
            if part.size >= next_check:
                self.cache.evict()
                next_check += _CHECK_EVERY
        if stream.size is not None and part.size != stream.size:
            raise OSError(f"the connection ended after {part.size} of {stream.size} bytes")

    def _on_disk(self, write: Callable[[], _T]) -> _T:
        """Run `write`; when the disk is full, delete the least recently used copy and run it again."""
        while True:
            try:
                return write()
            except OSError as error:
                setting = f"{self.cache.group}cache_dir"
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise CacheError(f"{setting}={self.cache.cache_dir} cannot be written: {error}") from error
                if not self.cache.evict_one():
                    remedy = f"free some of it, or name another {setting}"
                    raise CacheError(f"the disk of {setting}={self.cache.cache_dir} is full: {remedy}") from error

    def _check_limit(self, url: str, size: int) -> None:
        if size > self.cache.max_bytes:
            limit = f"{self.cache.group}cache_size={readable_bytes(self.cache.max_bytes)}"
            raise CacheError(f"shard {url} takes {readable_bytes(size)} or more, over the limit {limit}: raise that")


def _beating() -> bool:
    """Cancels nothing, but says that the process that waits for the shard goes on."""
    beat()
    return False
