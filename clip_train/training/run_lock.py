"""One process at work on a run: two that write to one folder would damage each other's run."""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from clip_train.errors import ConfigError, RunExistsError

_FILE = ".lock"
_POLL_S = 0.5
# Some shared file systems lock nothing, or only if mounted so.
_NOT_SUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}

log = logging.getLogger(__name__)
_held: dict[tuple[int, int], int] = {}  # descriptors, by device and inode


def _close_held() -> None:
    """A forked loader worker must not hold the lock: it would keep it beyond this process's death."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_held)


def lock_run(folder: Path, patience: float = 0) -> None:
    """Be the one process at work on a run, until the process ends; nothing new if it is already.

    Args:
        folder: of the run; made if there is none.
        patience: seconds to wait for another process, which may be ending.

    Raises:
        RunExistsError: another process is at work on it.
        ConfigError: the folder cannot be written to.
    """
    path = folder / _FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another output_dir") from error
    status = os.fstat(descriptor)
    key = (status.st_dev, status.st_ino)
    if key in _held or not _lock(descriptor, folder, patience):
        os.close(descriptor)  # the lock belongs to the other descriptor
        return
    _held[key] = descriptor
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def _lock(descriptor: int, folder: Path, patience: float) -> bool:
    """Whether the file is locked now; False where there are no locks."""
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                log.warning("%s cannot be locked (%s): start no second run of this name", folder, error.strerror)
                return False
            if time.monotonic() >= end:
                owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
                os.close(descriptor)
                raise RunExistsError(
                    f"{folder} is being trained by {owner}: wait for its end, or choose another run_name"
                ) from error
        time.sleep(_POLL_S)
