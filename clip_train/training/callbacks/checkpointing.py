"""When a run saves: at its cadences, at its best, when it ends, and again when saving failed."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import CheckpointIO

from clip_train.checkpoints.choice import newest_valid
from clip_train.checkpoints.folder import read_checkpoint, read_manifest
from clip_train.checkpoints.mirror import Mirror
from clip_train.checkpoints.snapshot import SnapshotTaker
from clip_train.checkpoints.writer import CheckpointWriter
from clip_train.distributed import gather_objects, max_on_hosts
from clip_train.errors import SaveError
from clip_train.heartbeat import beat
from clip_train.training.callbacks.agreement import Vote
from clip_train.training.callbacks.metrics import TrainMetrics
from clip_train.training.durations import passes
from clip_train.training.module import ClipModule
from clip_train.training.signals import stop_requested

log = logging.getLogger(__name__)

_FINAL_ATTEMPTS = 5
_LEAVING_SECONDS = 60.0
_TURN_SECONDS = 1.0
_POLL_SECONDS = 0.2
_WRITING_SECONDS = 1800.0  # what takes longer is for the watchdog


class FolderCheckpointIO(CheckpointIO):
    """How Lightning reads our checkpoints; `Checkpointing` writes them."""

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        raise NotImplementedError("Checkpointing saves")

    def remove_checkpoint(self, path) -> None:
        raise NotImplementedError("Checkpointing removes")


def finish_copies(mirror: Mirror) -> None:
    """Wait as long as copies advance and no rank is told to stop.

    All ranks wait, as what has started them may end the last of them when the others have gone.
    """
    if mirror.advancing:
        log.info("waiting for the copies at checkpoint.mirror; a signal ends this")
    while max_on_hosts(2 if stop_requested() else int(mirror.advancing)) == 1:
        time.sleep(_POLL_SECONDS)


class Checkpointing(Callback):
    """Saves at cadences, when a metric is at its best, and at the end; training waits for the copy in memory only.

    A checkpoint that falls due while the last one is being written waits for it, training does not.

    Args:
        writer: of this rank.
        every_samples: cadence; None saves at the end only.
        every_minutes: another cadence, by the first rank's clock; None for none.
        milestone_samples: a third, whose checkpoints stay for good; None for none.
        asynchronous: False writes before training goes on, and keeps no memory for the copy.
        resumed_from: what the run goes on from.
        about: what the manifest says of the run, besides metrics.
        metrics: read before each save, so that a run that has diverged is not saved.

    Attributes:
        votes: for the ranks' agreement.
        longest_stall: seconds that training stood still for one checkpoint, at the most.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        *,
        every_samples: int | None,
        every_minutes: float | None,
        milestone_samples: int | None,
        asynchronous: bool,
        resumed_from: Path | None,
        about: Callable[[], Mapping[str, Any]],
        metrics: TrainMetrics,
    ) -> None:
        self.writer, self.every_samples, self.every_minutes = writer, every_samples, every_minutes
        self.milestone_samples = milestone_samples
        self.asynchronous, self.resumed_from, self.about, self.metrics = asynchronous, resumed_from, about, metrics
        self.longest_stall = 0.0
        self._wanted, self._unfinished = Vote(self._wants_one), Vote(lambda: int(writer.busy))
        self.votes = (self._wanted, self._unfinished)
        self._snapshots = SnapshotTaker(copy=asynchronous)
        self._due = self._milestone_due = False
        self._saved_samples: int | None = None
        self._saved_at = time.monotonic()

    def _wants_one(self) -> int:
        minutes = (time.monotonic() - self._saved_at) / 60
        by_the_clock = self.every_minutes is not None and self.writer.rank == 0 and minutes >= self.every_minutes
        return int(by_the_clock or self.writer.retry_due)

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        if trainer.is_global_zero:
            self.writer.remove_from(pl_module.samples_seen, self.resumed_from)
        if self.resumed_from and self.resumed_from.resolve().parent == self.writer.folder.resolve():
            self._saved_samples = pl_module.samples_seen
            if self.writer.mirror and trainer.is_global_zero:
                self.writer.mirror.upload_missing(self.resumed_from)
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: ClipModule, outputs, batch, batch_idx) -> None:
        self._take_note(pl_module)
        may_save = not self._unfinished.total and not trainer.should_stop
        if self._due and may_save and not self.metrics.in_bad_row(trainer):
            self._save(trainer, pl_module)

    def _take_note(self, module: ClipModule) -> None:
        """What is due by now; it stays so until it is saved."""
        samples_seen, batch_size = module.samples_seen, module.clock.batch_size
        self._milestone_due |= passes(samples_seen, batch_size, self.milestone_samples)
        self._due |= passes(samples_seen, batch_size, self.every_samples) or self._milestone_due
        self._due |= self._wanted.total > 0

    def after_evaluation(self, trainer: L.Trainer, pl_module: ClipModule, metrics: Mapping[str, float]) -> None:
        """Note the metrics in this moment's checkpoint; save one if there is none and they are the best so far."""
        if self._saved_samples == pl_module.samples_seen:
            self.writer.add_metrics(pl_module.samples_seen, metrics)
            if trainer.should_stop:
                self.writer.wait()
        elif self._is_best(trainer, metrics) and not self.metrics.in_bad_row(trainer):
            self._save(trainer, pl_module, metrics)

    def _is_best(self, trainer: L.Trainer, metrics: Mapping[str, float]) -> bool:
        """What the first rank finds on its disk, on every rank."""
        if self.writer.retention.metric is None:
            return False
        best = False
        if trainer.is_global_zero:
            self.writer.wait()
            best = self.writer.retention.is_best(metrics, self.writer.saved())
        return trainer.strategy.broadcast(best)

    def on_train_end(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        """The last save, tried a few times; none if the run can go on and its last step was bad (`guard.py`).

        Raises:
            SaveError: it could not be written.
        """
        if self.metrics.in_bad_row(trainer) and pl_module.samples_seen < pl_module.clock.total_samples:
            log.warning("the last step was skipped, so nothing is saved; the run goes on from the checkpoint before")
            return
        self._take_note(pl_module)
        for attempt in range(_FINAL_ATTEMPTS):
            self._save(trainer, pl_module)
            self._wait_for_ranks()
            failures = gather_objects([self.writer.failure] if self.writer.failure else [])
            if not failures:
                return
            if attempt + 1 < _FINAL_ATTEMPTS:
                time.sleep(2**attempt)
        # The last is of a rank that could not write, the first may be of one that waited for it.
        raise SaveError(
            f"the last checkpoint could not be written to {self.writer.folder} ({failures[-1]}): make room or mend it,"
            " then run again with resume=auto"
        )

    def save_between_steps(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        """Save this moment, on all ranks, if it is not saved, as the next step cannot be made; failures are logged."""
        if pl_module.samples_seen in (0, self._saved_samples) or self.metrics.in_bad_row(trainer):
            return
        self._save(trainer, pl_module)
        self._wait_for_ranks()

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        """Let a checkpoint that is being written be completed, unless the user wants to leave at once."""
        if not isinstance(exception, KeyboardInterrupt):
            with suppress(TimeoutError):
                self.writer.wait(_LEAVING_SECONDS)

    def teardown(self, trainer: L.Trainer, pl_module: ClipModule, stage: str) -> None:
        """Let copies for the mirror be completed: a stopped run waits for a minute at the most."""
        if self.writer.mirror is None:
            return
        with suppress(TimeoutError):
            self.writer.wait(_LEAVING_SECONDS)  # it may have a last manifest to copy
        if pl_module.samples_seen >= pl_module.clock.total_samples:
            finish_copies(self.writer.mirror)
        self.writer.mirror.wait(_LEAVING_SECONDS)

    def newest(self) -> tuple[Path, int] | None:
        """The newest valid checkpoint, when all are written, or what the run went on from; and its samples seen."""
        self.writer.wait()
        path, manifest = newest_valid(self.writer.folder) or (self.resumed_from, None)
        return (path, (manifest or read_manifest(path)).samples_seen) if path else None

    def _save(self, trainer: L.Trainer, pl_module: ClipModule, metrics: Mapping[str, float] | None = None) -> None:
        with self.metrics.paused(trainer):
            start = time.perf_counter()
            self._wait_for_ranks()
            state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            writes = self.writer.rank < self.writer.ranks
            snapshot = self._snapshots.take(state, self.writer.rank) if writes else None
            if max_on_hosts(int(snapshot is not None and self.writer.holds(snapshot))):
                self.writer.failure = ""  # the run stands where it began, or where it saved last
            elif snapshot:
                about = {**self.about(), "metrics": dict(metrics or {}), "milestone": self._milestone_due}
                self.writer.write(snapshot, about)
            if not self.asynchronous:
                self._wait_for_ranks()
            self.longest_stall = max(self.longest_stall, time.perf_counter() - start)
        self._due = self._milestone_due = False
        self._saved_samples, self._saved_at = pl_module.samples_seen, time.monotonic()

    def _wait_for_ranks(self) -> None:
        """Until what any rank has begun is written, or has failed; they wait together, and tell their watchdogs."""
        end = time.monotonic() + _WRITING_SECONDS
        while max_on_hosts(int(self.writer.busy)):
            if time.monotonic() < end:
                beat()
            with suppress(TimeoutError):
                self.writer.wait(_TURN_SECONDS)
