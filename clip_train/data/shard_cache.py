"""A folder of local copies of remote shards, with a size limit, that threads, processes and jobs share.

A copy under its final name is whole. It grows as `NAME.tar.part`, on which its writer holds a lock; the kernel ends the
lock with the process, and whoever comes next goes on where the part ends. Who reads a copy may hold a shared lock on
it, and what is locked is not evicted. Nothing else is coordinated, so nothing can be left behind wrong.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from clip_train.data.files import write_atomic
from clip_train.errors import ConfigError, DataError

_COPY = re.compile(r".*-[0-9a-f]{16}\.tar(\.part)?")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_LOCK_POLL_S = 0.1

_log = logging.getLogger(__name__)
_locked: set[int] = set()


def _close_locked() -> None:
    """A forked child must not hold the locks of its parent's threads: it would keep them beyond the parent's death."""
    for descriptor in _locked:
        os.close(descriptor)
    _locked.clear()


os.register_at_fork(after_in_child=_close_locked)


class CacheError(DataError):
    """The cache cannot take a copy; nothing is known to be wrong with the shard."""


def parse_bytes(size: str | int, setting: str) -> int:
    """`200GB` -> 200 * 10**9; `GiB` and the like are powers of 1024; a bare number is bytes.

    Raises:
        ConfigError: it is no positive size; the message names `setting`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    number = float(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if number < 1:
        raise ConfigError(f"{setting}={size} is not a size such as 200GB or 1.5TB")
    return int(number)


def readable_bytes(size: int) -> str:
    """`1500000000` -> `1.5 GB`."""
    power = min((len(str(size)) - 1) // 3, 4)
    return f"{size / 1000**power:.3g} {('bytes', 'KB', 'MB', 'GB', 'TB')[power]}"


def copy_path(url: str, cache_dir: str | Path) -> Path:
    """Where the copy of `url` is, or would be. It depends on nothing but the two."""
    names = re.findall(r"([\w.-]+)\.tar\b", url)
    stem = names[-1][-80:].lstrip(".-") if names else "shard"
    return Path(cache_dir) / "staged" / f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"


class Part:
    """The beginning of a copy, which this thread alone writes.

    Beside it, `NAME.tar.part.json` says of which version of the remote file it is. What was written before the machine
    was last started does not count: of that, the disk may have kept the length and not the bytes.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    @property
    def size(self) -> int:
        """Bytes written."""
        return os.fstat(self._descriptor).st_size

    def resumable(self) -> tuple[int, str]:
        """The bytes that an earlier download left, and the version of the remote file they are from."""
        note = _read_note(self.path)
        return (self.size, note["version"]) if note.get("boot") == _boot_id() and note["version"] else (0, "")

    def begin(self, start: int, size: int | None, version: str) -> None:
        """Keep `start` bytes; the file is going to have `size`, which counts towards the limit from now on."""
        os.ftruncate(self._descriptor, start)
        note = {"size": size or 0, "version": version, "boot": _boot_id()}
        write_atomic(_note_path(self.path), json.dumps(note).encode())

    def write(self, content: bytes | memoryview) -> int:
        """Append as much as goes at once; returns how much."""
        return os.write(self._descriptor, content)

    def finish(self, path: Path, modified: float | None) -> None:
        """Give the copy its final name, and the remote file's time, by which an index knows it when it comes again."""
        now = time.time_ns()
        os.fsync(self._descriptor)
        os.utime(self._descriptor, ns=(now, now if modified is None else int(modified * 10**9)))
        os.rename(self.path, path)
        _note_path(self.path).unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete it."""
        self.path.unlink(missing_ok=True)
        _note_path(self.path).unlink(missing_ok=True)


class _Entry(NamedTuple):
    used_ns: int
    size: int
    path: Path


class ShardCache:
    """The copies below `cache_dir/staged`.

    Args:
        cache_dir: nothing outside its subfolder `staged` is touched.
        max_bytes: of all copies together, of whichever process. Those in use are kept even beyond it.
        group: what stands before `cache_dir` and `cache_size` in the program's config, as `data.`; for messages.
    """

    def __init__(self, cache_dir: str | Path, max_bytes: int, group: str = "") -> None:
        self.cache_dir, self.max_bytes, self.group = Path(cache_dir), max_bytes, group
        self._warned = False

    def path(self, url: str) -> Path:
        """Where `url`'s copy is, or would be."""
        return copy_path(url, self.cache_dir)

    def touch(self, url: str) -> bool:
        """Whether `url`'s copy is there; if so it counts as used now, and is evicted later than others."""
        path = self.path(url)
        try:
            os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))
        except FileNotFoundError:
            return False
        except OSError:  # another user's, or a read-only folder
            return path.exists()
        return True

    def size(self, url: str) -> int | None:
        """Bytes of `url`'s copy; None if there is none."""
        try:
            return self.path(url).stat().st_size
        except FileNotFoundError:
            return None

    def acquire(self, url: str) -> int | None:
        """A descriptor of `url`'s copy, which is not evicted until that is closed; None if there is no copy."""
        try:
            descriptor = os.open(self.path(url), os.O_RDONLY)
        except FileNotFoundError:
            return None
        with suppress(OSError):  # a file system without locks: copies put there by hand are readable all the same
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # evicted this very moment
        return None

    @contextmanager
    def part(self, url: str, wait: Callable[[float], None]) -> Iterator[Part]:
        """The locked beginning of a copy, empty or left by a download that was cut off.

        While another holds the lock, `wait(seconds)` is called again and again.

        Raises:
            CacheError: the folder cannot be written, or its file system has no locks.
        """
        path = Path(f"{self.path(url)}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while (descriptor := _lock(path, os.O_CREAT)) is None:
                wait(_LOCK_POLL_S)
        except OSError as error:
            raise CacheError(f"{self.group}cache_dir={self.cache_dir} cannot be used: {error}") from error
        part = Part(path, descriptor)
        try:
            yield part
        except BaseException:
            if part.size == 0:
                part.discard()
            raise
        finally:
            _unlock(descriptor)

    def evict(self) -> None:
        """Delete least recently used copies until all fit the limit, or the rest is in use."""
        entries = sorted(self._entries())
        excess = sum(entry.size for entry in entries) - self.max_bytes
        for entry in entries:
            if excess <= 0:
                return
            if _delete_if_unused(entry.path):
                excess -= entry.size
        if excess > 0 and not self._warned:
            self._warned = True
            limit = f"{self.group}cache_size={readable_bytes(self.max_bytes)}"
            _log.warning("%s is exceeded by %s: all shards are in use", limit, readable_bytes(excess))

    def evict_one(self) -> bool:
        """Delete the least recently used copy that is not in use, if any."""
        return any(_delete_if_unused(entry.path) for entry in sorted(self._entries()))

    def _entries(self) -> Iterator[_Entry]:
        try:
            files = list(os.scandir(self.cache_dir / "staged"))
        except FileNotFoundError:
            return
        for file in files:
            match = _COPY.fullmatch(file.name)
            with suppress(FileNotFoundError):
                if match and match[1]:
                    status, expected = file.stat(), _read_note(Path(file.path)).get("size", 0)
                    yield _Entry(status.st_mtime_ns, max(status.st_size, expected), Path(file.path))
                elif match:
                    yield _Entry(file.stat().st_atime_ns, file.stat().st_size, Path(file.path))


def _lock(path: Path, create: int = 0) -> int | None:
    """A descriptor that holds the lock on `path`; None while another does."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | create, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            _locked.add(descriptor)
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass  # held by another; or finished, or deleted, since it was opened
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it to a child forked in between
    _locked.discard(descriptor)
    os.close(descriptor)


def _delete_if_unused(path: Path) -> bool:
    """Whether `path` is gone now."""
    try:
        descriptor = _lock(path)
    except FileNotFoundError:
        return True
    except OSError:  # another user's
        return False
    if descriptor is None:
        return False
    try:
        path.unlink()
        _note_path(path).unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        _unlock(descriptor)
    return True


def _note_path(part: Path) -> Path:
    return Path(f"{part}.json")


def _read_note(part: Path) -> dict:
    try:
        return json.loads(_note_path(part).read_bytes())
    except (OSError, ValueError):
        return {}


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
