"""Runs the trials of a sweep, several at a time, and writes down what became of each."""

import fcntl
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from hydra.core.utils import JobReturn, JobStatus

from clip_train.commands.program import EXIT_DIVERGED, EXIT_DONE, EXIT_RESUMABLE
from clip_train.errors import ConfigError
from clip_train.sweeps.objective import Objective
from clip_train.sweeps.trial import (
    COMPLETE,
    DIVERGED,
    FAILED,
    INTERRUPTED,
    PRUNED,
    RUNNING,
    Trial,
    TrialFile,
    read_summary,
)
from clip_train.training.signals import stop_requested

EXIT_FAILED = 1

log = logging.getLogger(__name__)

Launch = Callable[[Sequence[Sequence[str]], int], Sequence[JobReturn]]


class Trials(Protocol):
    """Where trials come from: `grid.py`, `study.py`."""

    def next(self) -> Trial | None: ...

    def finish(self, trial: Trial) -> None: ...

    def all(self) -> list[Trial]: ...


class SweepRunner:
    """Takes trials from their source until there are no more, too many have failed, or a signal came.

    Args:
        trials: the source.
        objective: what their value is.
        launch: a launcher's `launch`; several threads call it at the same time.
        overrides: of every trial, before its own.
        n_jobs: trials at a time; None hands all to the launcher at once.
        max_failures: the sweep ends when more trials than this have failed; None for no limit.
        study: what a run needs to report to the study; None if it reports nothing.
        changed: called after each trial that has ended.
    """

    def __init__(
        self,
        trials: Trials,
        objective: Objective,
        launch: Launch,
        overrides: Sequence[str],
        *,
        n_jobs: int | None,
        max_failures: int | None,
        study: Mapping[str, Any] | None,
        changed: Callable[[], None],
    ) -> None:
        self.trials, self.objective, self.launch, self.overrides = trials, objective, launch, list(overrides)
        self.n_jobs, self.max_failures, self.study, self.changed = n_jobs, max_failures, study, changed
        self.num_failed, self.interrupted = 0, False
        self._broken = False
        self._lock = threading.Lock()

    def run(self) -> int:
        """Run all trials.

        Returns:
            75 if a signal ended the sweep, 1 if too many trials failed, otherwise 0.

        Raises:
            ConfigError: the runs have no such metric, or the study cannot hold the trials.
        """
        if self.n_jobs is None:
            self._run_together()
        else:
            with ThreadPoolExecutor(self.n_jobs) as pool:
                for worker in [pool.submit(self._work) for _ in range(self.n_jobs)]:
                    worker.result()
        if self.interrupted or stop_requested():
            return EXIT_RESUMABLE
        return EXIT_FAILED if self._too_many_failed() else EXIT_DONE

    def _work(self) -> None:
        try:
            while trial := self._next():
                if not self._settled(trial):
                    (job,) = self.launch([self._job(trial)], trial.number)
                    self._end(trial, job)
        except BaseException:
            self._broken = True  # no worker begins another trial
            raise

    def _run_together(self) -> None:
        """Everything that is to be done in as few calls as the numbers allow: under SLURM each is an array."""
        waiting = [trial for trial in iter(self._next, None) if not self._settled(trial)]
        for group in _consecutive(waiting):
            for trial, job in zip(group, self.launch([self._job(t) for t in group], group[0].number), strict=True):
                self._end(trial, job)

    def _next(self) -> Trial | None:
        with self._lock:
            stop = stop_requested() or self.interrupted or self._broken or self._too_many_failed()
            return None if stop else self.trials.next()

    def _too_many_failed(self) -> bool:
        return self.max_failures is not None and self.num_failed > self.max_failures

    def _settled(self, trial: Trial) -> bool:
        """Whether the trial is not to be launched: an earlier start has brought it to its end, or a signal came."""
        file = TrialFile(trial.folder)
        file.write(trial, self.study)
        if not file.wait_until_free():
            trial.state, self.interrupted = INTERRUPTED, True
            self._record(trial)
            return True
        if self._read_result(trial):
            self._record(trial)
            return True
        log.info("trial %d: %s", trial.number, " ".join(trial.overrides))
        trial.state = RUNNING
        return False

    def _job(self, trial: Trial) -> list[str]:
        return [*self.overrides, *trial.overrides]

    def _end(self, trial: Trial, job: JobReturn) -> None:
        code = _exit_code(job)
        if code == EXIT_RESUMABLE or (code and stop_requested()):  # a scheduler may have its own code for a stop
            trial.state, self.interrupted = INTERRUPTED, True
        elif code == EXIT_DIVERGED:
            trial.state = DIVERGED
        elif code or not self._read_result(trial):
            trial.state = FAILED
        self._record(trial)

    def _read_result(self, trial: Trial) -> bool:
        """Take state and value from the run's summary; False if it has not ended."""
        summary = read_summary(trial.folder)
        if summary.get("complete"):
            trial.value = self.objective.value(summary["metrics"])
            trial.state = COMPLETE if math.isfinite(trial.value) else FAILED
        elif summary.get("pruned"):
            trial.state = PRUNED
        else:
            return False
        return True

    def _record(self, trial: Trial) -> None:
        value = "" if trial.value is None else f", {self.objective.name} {trial.value:.6g}"
        log.info("trial %d: %s%s", trial.number, trial.state, value)
        with self._lock:
            self.num_failed += trial.state == FAILED
            self.trials.finish(trial)
            self.changed()


def _exit_code(job: JobReturn) -> int:
    if job.status == JobStatus.COMPLETED:
        return EXIT_DONE
    error = job._return_value  # `return_value` would raise it
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else EXIT_FAILED


def _consecutive(trials: Sequence[Trial]) -> list[list[Trial]]:
    groups: list[list[Trial]] = []
    for trial in trials:
        if groups and groups[-1][-1].number + 1 == trial.number:
            groups[-1].append(trial)
        else:
            groups.append([trial])
    return groups


@contextmanager
def only_sweep_in(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of the folder.

    Raises:
        ConfigError: another is at work in it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another hydra.sweep.dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process runs the sweep in {folder}: wait for it or stop it") from error
        yield
