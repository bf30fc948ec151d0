"""Writes checkpoints beside training, and removes those that are not kept."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from clip_train.checkpoints.folder import (
    UNFINISHED,
    InvalidCheckpointError,
    Manifest,
    checkpoint_name,
    list_checkpoints,
    read_manifest,
    samples_of,
    whole_folder,
    write_manifest,
    write_pieces,
)
from clip_train.checkpoints.mirror import Mirror
from clip_train.checkpoints.retention import Retention
from clip_train.checkpoints.snapshot import Snapshot
from clip_train.checkpoints.tensor_files import FileRecord
from clip_train.data.files import write_atomic

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 10.0, 600.0
_RANKS_SECONDS = 1800.0  # the slowest rank's part
_POLL_SECONDS = 0.05


class CheckpointWriter:
    """One rank's writer. A failure is logged, remembered and tried again; it never ends training.

    Args:
        folder: where checkpoints go.
        retention: which of them stay.
        rank: the first one completes and removes checkpoints; of the others only sharded tensors are written.
        ranks: how many write.
        mirror: where copies go.
        on_saved: told of each complete checkpoint, on the first rank; what they raise is logged.

    Attributes:
        failure: why the last checkpoint could not be written; empty if it could.
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention,
        *,
        rank: int = 0,
        ranks: int = 1,
        mirror: Mirror | None = None,
        on_saved: Sequence[Callable[[Path], None]] = (),
    ) -> None:
        self.folder, self.retention, self.rank, self.ranks = folder, retention, rank, ranks
        self.mirror, self.on_saved = mirror, on_saved
        self.failure = ""
        self._retry_at, self._retry_seconds = 0.0, _FIRST_RETRY_SECONDS
        self._jobs = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._last: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether the last checkpoint is still being written."""
        return self._last is not None and not self._last.done()

    @property
    def retry_due(self) -> bool:
        """Whether a failed checkpoint should be tried again by now."""
        return bool(self.failure) and time.monotonic() >= self._retry_at

    def write(self, snapshot: Snapshot, about: Mapping[str, Any]) -> None:
        """Begin to write; the snapshot must stay as it is until `busy` is False."""
        self._last = self._jobs.submit(self._try, lambda: self._write(snapshot, about), snapshot.samples_seen)

    def add_metrics(self, samples_seen: int, metrics: Mapping[str, float]) -> None:
        """Note in a checkpoint, once it is written, what was measured at that moment."""
        self._last = self._jobs.submit(self._try, lambda: self._add_metrics(samples_seen, metrics), samples_seen)

    def wait(self) -> None:
        """Until all that was begun is written, or has failed."""
        if self._last is not None:
            self._last.result()

    def is_best(self, path: Path) -> bool:
        """Whether this complete checkpoint is the best of those that are there."""
        return self.retention.is_top(samples_of(path), self.metrics_of_saved())

    def remove_from(self, samples_seen: int, but: Path | None) -> None:
        """Remove what a run that stands at `samples_seen` will write anew, and what was left unfinished.

        What lies ahead of a run resumed from an older checkpoint is another run's future.

        Args:
            but: the checkpoint that the run goes on from.
        """
        for path in self.folder.glob(f"samples_*{UNFINISHED}"):
            shutil.rmtree(path, ignore_errors=True)
        for path in list_checkpoints(self.folder):
            if samples_of(path) >= samples_seen and (but is None or path.resolve() != but.resolve()):
                log.warning("removing %s, which lies ahead of %d samples", path, samples_seen)
                self._remove(path)

    def metrics_of_saved(self) -> dict[int, dict[str, float]]:
        """What was measured at each complete checkpoint."""
        found = {}
        for path in list_checkpoints(self.folder):
            try:
                found[samples_of(path)] = dict(read_manifest(path).about.get("metrics", {}))
            except InvalidCheckpointError:
                continue
        return found

    def _try(self, job: Callable[[], None], samples_seen: int) -> None:
        try:
            job()
        except Exception as error:  # whatever it is, training goes on
            self.failure = f"{type(error).__name__}: {error}"
            self._retry_at = time.monotonic() + self._retry_seconds
            log.error(
                "COULD NOT SAVE A CHECKPOINT at %d samples (%s); training goes on, the next attempt is in %.0f s",
                samples_seen,
                self.failure,
                self._retry_seconds,
            )
            self._retry_seconds = min(2 * self._retry_seconds, _LONGEST_RETRY_SECONDS)
        else:
            self.failure, self._retry_seconds = "", _FIRST_RETRY_SECONDS

    def _write(self, snapshot: Snapshot, about: Mapping[str, Any]) -> None:
        path = self.folder / checkpoint_name(snapshot.samples_seen)
        if self.rank > 0:
            self._write_part(path.with_name(f"{path.name}{UNFINISHED}"), snapshot)
            return
        if path.exists() and _is_complete(path):
            return  # the run stands where it began
        with whole_folder(path) as temporary:
            files = write_pieces(temporary, snapshot, self.rank, sharded=self.ranks > 1)
            for rank in range(1, self.ranks):
                files |= _records_of(temporary, rank)
            write_manifest(temporary, Manifest(snapshot.samples_seen, files, about))
        log.info("saved %s", path)
        self._after_save(path)

    def _write_part(self, folder: Path, snapshot: Snapshot) -> None:
        records = write_pieces(folder, snapshot, self.rank, sharded=True)
        content = {name: asdict(record) for name, record in records.items()}
        write_atomic(_record_file(folder, self.rank), json.dumps(content).encode())

    def _add_metrics(self, samples_seen: int, metrics: Mapping[str, float]) -> None:
        path = self.folder / checkpoint_name(samples_seen)
        if self.rank > 0 or not path.exists():
            return
        manifest = read_manifest(path)
        known = manifest.about.get("metrics", {})
        write_manifest(path, replace(manifest, about={**manifest.about, "metrics": {**known, **metrics}}))
        self._after_save(path)

    def _after_save(self, path: Path) -> None:
        for tell in (*((self.mirror.upload,) if self.mirror else ()), *self.on_saved):
            try:
                tell(path)
            except Exception as error:
                log.error("%s is saved, but not passed on (%s: %s)", path, type(error).__name__, error)
        kept = self.retention.kept(self.metrics_of_saved())
        for old in list_checkpoints(self.folder):
            if samples_of(old) not in kept and samples_of(old) < samples_of(path):
                self._remove(old)

    def _remove(self, path: Path) -> None:
        """Rename first: half a checkpoint must not stand under its name."""
        doomed = path.with_name(f"{path.name}{UNFINISHED}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        if self.mirror:
            try:
                self.mirror.remove(path.name)
            except Exception as error:
                log.warning("%s could not be removed from the mirror (%s)", path.name, error)


def _is_complete(path: Path) -> bool:
    try:
        read_manifest(path)
    except InvalidCheckpointError:
        return False
    return True


def _record_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def _records_of(folder: Path, rank: int) -> dict[str, FileRecord]:
    """What another rank wrote, once it has.

    Raises:
        TimeoutError: it did not within half an hour.
    """
    path = _record_file(folder, rank)
    end = time.monotonic() + _RANKS_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"rank {rank} did not write its part")
        time.sleep(_POLL_SECONDS)
    records = {name: FileRecord(**record) for name, record in json.loads(path.read_text()).items()}
    path.unlink()
    return records
