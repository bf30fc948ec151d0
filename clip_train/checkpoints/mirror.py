"""A second copy of the checkpoints at an fsspec address, such as s3://bucket/runs/b32."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from clip_train.checkpoints.folder import MANIFEST
from clip_train.errors import ConfigError

log = logging.getLogger(__name__)

_STALLED_SECONDS = 600.0  # a store that has taken nothing for so long


class Mirror:
    """Copies checkpoints to a folder elsewhere, one after the other, in a thread that nothing has to wait for.

    What goes wrong is logged.

    Args:
        url: the folder; s3:// and gs:// need the extra `clip_train[remote]`.
        original: where the checkpoints are.

    Raises:
        ConfigError: there is no such kind of address, its library is not installed, or it is that of the original.
    """

    def __init__(self, url: str, original: Path) -> None:
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.mirror={url}: {error}") from error
        if isinstance(self.files, LocalFileSystem) and Path(self.root).resolve() == original.resolve():
            raise ConfigError(f"checkpoint.mirror={url} is where the checkpoints are: give it another folder")
        self._whole: set[str] = set()  # names of the copies that have all files
        self._moved_at = time.monotonic()
        self._jobs: queue.Queue[tuple[str, Callable[[], None]]] = queue.Queue()
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def upload(self, checkpoint: Path) -> None:
        """Begin to copy a checkpoint; its manifest comes last, so that a copy that has one is whole."""
        self._begin(f"{checkpoint.name} could not be copied", lambda: self._upload(checkpoint))

    def upload_manifest(self, checkpoint: Path) -> None:
        """Begin to copy the manifest alone, of a checkpoint that was copied before; of any other, all of it."""
        self._begin(f"{checkpoint.name}: its manifest could not be copied", lambda: self._upload_manifest(checkpoint))

    def upload_missing(self, checkpoint: Path) -> None:
        """Begin to copy a checkpoint of an earlier process, if there is no whole copy of it."""
        self._begin(f"{checkpoint.name} could not be copied", lambda: self._upload_missing(checkpoint))

    def remove(self, name: str) -> None:
        """Begin to remove a copy, if there is one, its manifest first."""
        self._begin(f"{name} could not be removed", lambda: self._remove(name))

    @property
    def advancing(self) -> bool:
        """Whether something is left to do, and the store has taken some of it in the last ten minutes."""
        return bool(self._jobs.unfinished_tasks) and time.monotonic() - self._moved_at < _STALLED_SECONDS

    def wait(self, seconds: float) -> None:
        """Until all that was begun is done, but no longer than this; says what is not."""
        end = time.monotonic() + seconds
        while self._jobs.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.05)
        if self._jobs.unfinished_tasks:
            log.error("checkpoint.mirror: %d copies or removals are not done", self._jobs.unfinished_tasks)

    def _begin(self, failure: str, job: Callable[[], None]) -> None:
        self._jobs.put((failure, job))

    def _work(self) -> None:
        while True:
            failure, job = self._jobs.get()
            self._note_move()
            try:
                job()
            except Exception as error:  # whatever the store has to say
                log.error("checkpoint.mirror: %s (%s: %s)", failure, type(error).__name__, error)
            self._jobs.task_done()

    def _upload(self, checkpoint: Path) -> None:
        if not checkpoint.exists():
            return  # a slow store: newer ones have come since
        self._remove(checkpoint.name)  # of another history, or a part of one
        self.files.makedirs(f"{self.root}/{checkpoint.name}", exist_ok=True)
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == MANIFEST):
            self._put(path)
        self._whole.add(checkpoint.name)

    def _upload_manifest(self, checkpoint: Path) -> None:
        if checkpoint.name in self._whole:
            self._put(checkpoint / MANIFEST)
        else:
            self._upload(checkpoint)

    def _upload_missing(self, checkpoint: Path) -> None:
        copy = f"{self.root}/{checkpoint.name}/{MANIFEST}"
        if self.files.exists(copy) and self.files.cat_file(copy) == (checkpoint / MANIFEST).read_bytes():
            self._whole.add(checkpoint.name)
        else:
            self._upload(checkpoint)

    def _put(self, path: Path) -> None:
        told = Callback(hooks={"move": self._note_move})
        self.files.put_file(str(path), f"{self.root}/{path.parent.name}/{path.name}", callback=told)

    def _note_move(self, *progress: object, **more: object) -> None:
        """Called of each part that the store has taken."""
        self._moved_at = time.monotonic()

    def _remove(self, name: str) -> None:
        self._whole.discard(name)
        target = f"{self.root}/{name}"
        if self.files.exists(target):
            if self.files.exists(f"{target}/{MANIFEST}"):
                self.files.rm_file(f"{target}/{MANIFEST}")
            self.files.rm(target, recursive=True)
