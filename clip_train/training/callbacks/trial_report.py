"""A run that is a trial of a study: reports each evaluation, and stops early when the study's pruner says so."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from clip_train.errors import RunExistsError
from clip_train.sweeps.trial import TrialFile
from clip_train.training.callbacks.agreement import Vote
from clip_train.training.callbacks.metrics import TrainMetrics
from clip_train.training.module import ClipModule

log = logging.getLogger(__name__)


class TrialReport(Callback):
    """Reports to the study on the first rank; all ranks stop together, a step after the evaluation that decided it.

    Args:
        run_folder: of this run.
        rank: of this process.
        every_samples: between two evaluations. The study counts evaluations, so that trials with other batch sizes
            can be compared.
        metrics: of training, which may be what the study optimizes.

    Attributes:
        vote: how the ranks agree.
        pruned: the run was ended early.

    Raises:
        RunExistsError: another process is at work on this run.
    """

    def __init__(self, run_folder: Path, rank: int, every_samples: int | None, metrics: TrainMetrics) -> None:
        self.vote = Vote(lambda: int(self._prune))
        self.pruned = self._prune = False
        self.every_samples, self.metrics = every_samples, metrics
        self._file = TrialFile(run_folder)  # keeps the lock until the process ends, or the run goes back
        content = self._file.read() if rank == 0 else None
        if content and not self._file.lock():
            raise RunExistsError(f"{run_folder} is being trained by another process: wait for it or stop it")
        self._report = _Report(content["number"], content["study"]) if content and content["study"] else None

    def after_evaluation(self, trainer: L.Trainer, pl_module: ClipModule, metrics: Mapping[str, float]) -> None:
        """Called on every rank with all validation sets' metrics."""
        ended = pl_module.samples_seen >= pl_module.clock.total_samples
        if self._report and self.every_samples and not ended:
            self._prune = self._report(pl_module.samples_seen // self.every_samples, {**self.metrics.latest, **metrics})

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: ClipModule, batch: Any, batch_idx: int) -> None:
        if self.vote.total and not self.pruned:
            self.pruned = True
            log.info("pruned: worse than other trials at this point")
            trainer.should_stop = True  # after this step

    def on_exception(self, trainer: L.Trainer, pl_module: ClipModule, exception: BaseException) -> None:
        self._file.unlock()  # a roll-back takes the run up again in this process


class _Report:
    """One trial of a study."""

    def __init__(self, number: int, study: Mapping[str, Any]) -> None:
        from clip_train.sweeps.study import StudySettings  # Optuna, for those who sweep

        self.settings = StudySettings.of(study)
        self.number = number

    def __call__(self, evaluation: int, metrics: Mapping[str, float]) -> bool:
        """Report the objective's value; returns whether to stop."""
        try:
            return self.settings.report(self.number, evaluation, self.settings.objective.value(metrics))
        except Exception as error:  # a database that is away for a while must not end training
            log.warning("could not report to the study (%s); going on", str(error).split("\n", 1)[0])
            return False
