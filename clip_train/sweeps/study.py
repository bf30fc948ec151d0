"""A study of Optuna's: where the trials of a search come from, and what is known of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from hydra.utils import instantiate
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from clip_train.errors import ConfigError
from clip_train.sweeps.objective import Objective
from clip_train.sweeps.trial import COMPLETE, DIVERGED, FAILED, PRUNED, RUNNING, WAITING, Trial

_STATES = {
    TrialState.COMPLETE: COMPLETE,
    TrialState.PRUNED: PRUNED,
    TrialState.FAIL: FAILED,
    TrialState.RUNNING: RUNNING,
    TrialState.WAITING: WAITING,
}


@dataclass(frozen=True)
class StudySettings:
    """How to find a study, from the sweep and from its runs.

    Attributes:
        storage: a database's URL, or the path of a journal file.
        name: of the study in the storage.
        objective: what the study optimizes.
        pruner: `_target_` and arguments of one of `optuna.pruners`.
    """

    storage: str
    name: str
    objective: Objective
    pruner: Mapping[str, Any]

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "StudySettings":
        """The inverse of `dataclasses.asdict`, after a round through JSON."""
        metrics, direction = plain["objective"]["metrics"], plain["objective"]["direction"]
        return cls(**{**plain, "objective": Objective(metrics and tuple(metrics), direction)})

    def report(self, number: int, step: int, value: float) -> bool:
        """Tell the study a trial's value at a step; returns whether the pruner would end the trial."""
        trial = _open_trial(self.open(), number)
        trial.report(value, step)
        return trial.should_prune()

    def open(self, sampler: Mapping[str, Any] | None = None) -> optuna.Study:
        """Open the study, or begin it.

        Raises:
            ConfigError: the storage cannot be opened, or holds a study with another direction.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(
                storage=_open_storage(self.storage),
                study_name=self.name,
                pruner=instantiate(dict(self.pruner)),
                direction=self.objective.direction,
                load_if_exists=True,
            )
        except Exception as error:  # each database has its own
            raise ConfigError(f"hydra.sweeper.storage={self.storage}: {str(error).splitlines()[0]}") from error
        if study.direction.name.lower() != self.objective.direction:
            raise ConfigError(
                f"the study in {self.storage} has direction={study.direction.name.lower()}: "
                f"give that, or another hydra.sweep.dir"
            )
        if sampler:
            study.sampler = _sampler(sampler, len(study.trials))
        return study


class StudyTrials:
    """Trials that a study's sampler proposes; those that a killed sweep left unfinished come first.

    Args:
        settings: of the study.
        sampler: `_target_` and arguments of one of `optuna.samplers`.
        space: what to search.
        n_trials: of the whole study, whatever became of them.
        run_folder: of a trial, by its number.
    """

    def __init__(
        self,
        settings: StudySettings,
        sampler: Mapping[str, Any],
        space: Mapping[str, BaseDistribution],
        n_trials: int,
        run_folder: Callable[[int], Path],
    ) -> None:
        self._settings, self.study = settings, settings.open(sampler)
        self.space, self.n_trials, self._folder = dict(space), n_trials, run_folder
        self._unfinished = [trial for trial in self.study.trials if trial.state == TrialState.RUNNING]

    def next(self) -> Trial | None:
        """The next trial to run; None when there are enough.

        Raises:
            ConfigError: the study has other choices for a key.
        """
        while self._unfinished:
            trial = self._unfinished.pop(0)
            if trial.params.keys() == self.space.keys():
                return self._trial(trial)
            self.study.tell(trial.number, state=TrialState.FAIL)  # killed while it was drawn, or of another search
        if len(self.study.trials) >= self.n_trials:
            return None
        try:
            number = self.study.ask(self.space).number
        except ValueError as error:
            reason = str(error).rstrip(".")
            where = f"the study in {self._settings.storage} is of another search, choose another hydra.sweep.dir"
            raise ConfigError(f"{reason}: {where}") from error
        return self._trial(self.study.trials[number])

    def finish(self, trial: Trial) -> None:
        """Tell the study what became of a trial that has ended."""
        if trial.state == COMPLETE:
            self.study.tell(trial.number, trial.value)
        elif trial.state == FAILED:
            self.study.tell(trial.number, state=TrialState.FAIL)
        elif trial.state in (PRUNED, DIVERGED):  # from a failed trial the sampler would learn nothing
            _open_trial(self.study, trial.number).set_user_attr("ended", trial.state)
            self.study.tell(trial.number, state=TrialState.PRUNED)

    def all(self) -> list[Trial]:
        """Every trial so far."""
        return [self._trial(trial) for trial in self.study.trials]

    def _trial(self, trial: FrozenTrial) -> Trial:
        overrides = tuple(f"{key}={'null' if value is None else value}" for key, value in trial.params.items())
        value = trial.value if trial.state == TrialState.COMPLETE else None
        state = trial.user_attrs.get("ended", _STATES[trial.state])
        return Trial(trial.number, overrides, self._folder(trial.number), state, value)


def _open_trial(study: optuna.Study, number: int) -> optuna.Trial:
    return optuna.Trial(study, study.trials[number]._trial_id)


def _open_storage(storage: str) -> BaseStorage:
    if "://" in storage:
        return RDBStorage(storage)
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(storage))


def _sampler(sampler: Mapping[str, Any], trials_so_far: int) -> optuna.samplers.BaseSampler:
    """A sweep that goes on must not draw its first values again."""
    seed = sampler.get("seed")
    return instantiate(dict(sampler) if seed is None else {**sampler, "seed": seed + trials_so_far})
