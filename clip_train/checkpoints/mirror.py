"""A second copy of the checkpoints at an fsspec address, such as s3://bucket/runs/b32."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec

from clip_train.checkpoints.folder import MANIFEST
from clip_train.errors import ConfigError

log = logging.getLogger(__name__)


class Mirror:
    """Copies checkpoints to a folder elsewhere, one after the other, in a thread that nothing has to wait for.

    What goes wrong is logged.

    Args:
        url: the folder; s3:// and gs:// need the extra `clip_train[remote]`.

    Raises:
        ConfigError: there is no such kind of address, or its library is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.mirror={url}: {error}") from error

        self._jobs: queue.Queue[tuple[str, Callable[[], None]]] = queue.Queue()
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def upload(self, checkpoint: Path) -> None:
        """Begin to copy a checkpoint; its manifest comes last, so that a copy that has one is whole."""
        self._begin(f"{checkpoint.name} could not be copied", lambda: self._upload(checkpoint))

    def upload_manifest(self, checkpoint: Path) -> None:
        """Begin to copy the manifest alone, of a checkpoint that was copied before."""
        self._begin(f"{checkpoint.name}: its manifest could not be copied", lambda: self._put(checkpoint / MANIFEST))

    def remove(self, name: str) -> None:
        """Begin to remove a copy, if there is one, its manifest first."""
        self._begin(f"{name} could not be removed", lambda: self._remove(name))

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
            try:
                job()
            except Exception as error:  # whatever the store has to say
                log.error("checkpoint.mirror: %s (%s: %s)", failure, type(error).__name__, error)
            self._jobs.task_done()

    def _upload(self, checkpoint: Path) -> None:
        if not checkpoint.exists():
            return  # a slow store: newer ones have come since
        self.files.makedirs(f"{self.root}/{checkpoint.name}", exist_ok=True)
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == MANIFEST):
            self._put(path)

    def _put(self, path: Path) -> None:
        self.files.put_file(str(path), f"{self.root}/{path.parent.name}/{path.name}")

    def _remove(self, name: str) -> None:
        target = f"{self.root}/{name}"
        if self.files.exists(target):
            if self.files.exists(f"{target}/{MANIFEST}"):
                self.files.rm_file(f"{target}/{MANIFEST}")
            self.files.rm(target, recursive=True)
