"""Writes checkpoints beside training, and removes those that are not kept."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from clip_train.checkpoints.folder import (
    STATE,
    UNFINISHED,
    InvalidCheckpointError,
    Manifest,
    checkpoint_name,
    list_checkpoints,
    read_manifest,
    samples_of,
    verify,
    whole_folder,
    write_manifest,
    write_pieces,
)
from clip_train.checkpoints.mirror import Mirror
from clip_train.checkpoints.retention import Retention, Saved
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
        self._attempts = 0
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
        """Begin to write, on all ranks that write, when none of them is busy; the snapshot must stay until none is."""
        self._attempts += 1
        self._last = self._jobs.submit(self._try_to_write, snapshot, about, self._attempts)

    def add_metrics(self, samples_seen: int, metrics: Mapping[str, float]) -> None:
        """Note in a checkpoint, once it is written, what was measured at that moment."""
        self._last = self._jobs.submit(self._add_metrics, samples_seen, dict(metrics))

    def wait(self, seconds: float | None = None) -> None:
        """Until all that was begun is written, or has failed.

        Raises:
            TimeoutError: it takes longer than `seconds`.
        """
        if self._last is not None:
            self._last.result(seconds)

    def holds(self, snapshot: Snapshot) -> bool:
        """Whether a complete checkpoint is of the same moment of the same history; only the first rank knows."""
        if snapshot.rest is None:
            return False
        try:
            record = read_manifest(self.folder / checkpoint_name(snapshot.samples_seen)).files.get(STATE)
        except InvalidCheckpointError:
            return False
        return record is not None and record.sha256 == hashlib.sha256(snapshot.rest).hexdigest()

    def is_best(self, path: Path) -> bool:
        """Whether this complete checkpoint is the best of those that are there."""
        return self.retention.is_top(samples_of(path), self.saved())

    def remove_from(self, samples_seen: int, but: Path | None) -> None:
        """Remove what a run that stands at `samples_seen` will write anew, and what was left unfinished.

        What lies ahead of a run resumed from an older checkpoint is another run's future. A broken one is set aside,
        for whoever can mend it; the mirror is left as it is.

        Args:
            but: the checkpoint that the run goes on from.
        """
        self._remove_unfinished()
        for path in list_checkpoints(self.folder):
            if samples_of(path) < samples_seen or (but is not None and path.resolve() == but.resolve()):
                continue
            try:
                verify(path)
            except InvalidCheckpointError:
                _set_aside(path)
            else:
                log.warning("removing %s, which lies ahead of %d samples", path, samples_seen)
                _remove(path)

    def saved(self) -> dict[int, Saved]:
        """The complete checkpoints by samples seen."""
        found = {}
        for path in list_checkpoints(self.folder):
            try:
                about = read_manifest(path).about
            except InvalidCheckpointError:
                continue
            found[samples_of(path)] = Saved(about.get("metrics", {}), about.get("milestone", False))
        return found

    def _try_to_write(self, snapshot: Snapshot, about: Mapping[str, Any], attempt: int) -> None:
        path = self.folder / checkpoint_name(snapshot.samples_seen)
        # A name for each attempt: a slow rank's part of one that has failed must not be taken for one of the next.
        temporary = path.with_name(f"{path.name}.{attempt}{UNFINISHED}")
        try:
            if self.rank == 0:
                self._write(path, temporary, snapshot, about)
            else:
                self._write_part(temporary, snapshot)
        except Exception as error:  # whatever it is, training goes on
            self.failure = f"{type(error).__name__}: {error}"
            self._retry_at = time.monotonic() + self._retry_seconds
            log.error(
                "COULD NOT SAVE A CHECKPOINT at %d samples (%s); training goes on, the next attempt is in %.0f s",
                snapshot.samples_seen,
                self.failure,
                self._retry_seconds,
            )
            self._retry_seconds = min(2 * self._retry_seconds, _LONGEST_RETRY_SECONDS)
        else:
            self.failure, self._retry_seconds = "", _FIRST_RETRY_SECONDS

    def _write(self, path: Path, temporary: Path, snapshot: Snapshot, about: Mapping[str, Any]) -> None:
        self._remove_unfinished(but=temporary)
        with whole_folder(path, temporary):
            files = write_pieces(temporary, snapshot, self.rank, sharded=self.ranks > 1)
            for rank in range(1, self.ranks):
                files |= _records_of(temporary, rank)
            write_manifest(temporary, Manifest(snapshot.samples_seen, files, about))
        log.info("saved %s", path)
        self._after_save(path)

    def _write_part(self, folder: Path, snapshot: Snapshot) -> None:
        try:
            records = write_pieces(folder, snapshot, self.rank, sharded=True)
            content = {name: asdict(record) for name, record in records.items()}
            write_atomic(_record_file(folder, self.rank), json.dumps(content).encode())
        except Exception:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)  # the first rank may come to it later
                _failure_file(folder, self.rank).touch()  # an empty one, as the disk may be full
            raise

    def _remove_unfinished(self, but: Path | None = None) -> None:
        """Remove what attempts that failed, or were killed, have left; other ranks may be at work on `but`."""
        for path in self.folder.glob(f"samples_*{UNFINISHED}"):
            if path != but:
                shutil.rmtree(path, ignore_errors=True)

    def _add_metrics(self, samples_seen: int, metrics: Mapping[str, float]) -> None:
        path = self.folder / checkpoint_name(samples_seen)
        if self.rank > 0 or not path.exists():
            return
        try:
            manifest = read_manifest(path)
            known = manifest.about.get("metrics", {})
            write_manifest(path, replace(manifest, about={**manifest.about, "metrics": {**known, **metrics}}))
        except (OSError, InvalidCheckpointError) as error:
            log.error("could not note the metrics in %s (%s)", path, error)
            return
        if self.mirror:
            self.mirror.upload_manifest(path)
        self._tell(path)
        self._remove_old(path)

    def _after_save(self, path: Path) -> None:
        if self.mirror:
            self.mirror.upload(path)
        self._tell(path)
        self._remove_old(path)

    def _tell(self, path: Path) -> None:
        for tell in self.on_saved:
            try:
                tell(path)
            except Exception as error:
                log.error("%s is saved, but not passed on (%s: %s)", path, type(error).__name__, error)

    def _remove_old(self, newest: Path) -> None:
        kept = self.retention.kept(self.saved())
        for old in list_checkpoints(self.folder):
            if samples_of(old) not in kept and samples_of(old) < samples_of(newest):
                _remove(old)
                if self.mirror:
                    self.mirror.remove(old.name)


def _remove(path: Path) -> None:
    """Rename first: half a checkpoint must not stand under its name."""
    doomed = path.with_name(f"{path.name}{UNFINISHED}")
    try:
        path.rename(doomed)
    except OSError as error:
        log.error("could not remove %s (%s)", path, error.strerror)
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.invalid")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        path.rename(aside)
    except OSError as error:
        log.error("could not set %s aside (%s)", path, error.strerror)


def _record_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def _failure_file(folder: Path, rank: int) -> Path:
    """What a rank leaves in place of its record, so that the first one does not wait for it."""
    return folder / f"rank_{rank:05d}.failed"


def _records_of(folder: Path, rank: int) -> dict[str, FileRecord]:
    """What another rank wrote, once it has.

    Raises:
        OSError: it could not.
        TimeoutError: it did not within half an hour.
    """
    path, failed = _record_file(folder, rank), _failure_file(folder, rank)
    end = time.monotonic() + _RANKS_SECONDS
    while not path.exists():
        if failed.exists():
            raise OSError(f"rank {rank} could not write its part: logs/{failed.stem}.log says why")
        if time.monotonic() > end:
            raise TimeoutError(f"rank {rank} did not write its part")
        time.sleep(_POLL_SECONDS)
    records = {name: FileRecord(**record) for name, record in json.loads(path.read_text()).items()}
    path.unlink()
    return records
