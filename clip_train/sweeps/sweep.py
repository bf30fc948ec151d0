"""A sweep from the command line to its results: `clip-train --multirun`, with hydra/sweeper=grid or optuna."""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from clip_train.data.files import write_atomic
from clip_train.errors import ConfigError
from clip_train.sweeps.grid import GridTrials
from clip_train.sweeps.objective import Objective
from clip_train.sweeps.results import best_trial, write_best, write_results
from clip_train.sweeps.runner import EXIT_FAILED, SweepRunner, Trials, only_sweep_in
from clip_train.sweeps.trial import COMPLETE, DIVERGED, FAILED

log = logging.getLogger(__name__)

# Overrides that a sweep may be gone on with under another value: they decide how runs run, not what comes of them.
_MAY_CHANGE = ("trainer.", "checkpoint.", "logger", "resume.", "output_dir", "micro_batch_size", "data.num_workers")
_MAY_CHANGE += ("data.cache", "data.retries", "data.timeout")
_JOBS_THROUGH_A_SCHEDULER = 4


class Sweeper(Protocol):
    """The plug-in that Hydra made."""

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher
    settings: dict[str, Any]


def name_sweep_folder(config: DictConfig) -> None:
    """A sweep with a `run_name` lies in output_dir/run_name, so that the same command goes on with it."""
    given = any(str(override).startswith("hydra.sweep.dir=") for override in config.hydra.overrides.hydra)
    with open_dict(config):
        named = config.run_name is not None and not given
        config.hydra.sweep.dir = f"{config.output_dir}/{config.run_name}" if named else str(config.hydra.sweep.dir)


def sweep_grid(sweeper: Sweeper, arguments: Sequence[str]) -> None:
    """Run every combination.

    Raises:
        SystemExit: a trial failed, or a signal came.
    """
    sweep = _Sweep(sweeper)
    trials = GridTrials([*sweep.params(), *arguments], sweep.run_folder)
    with only_sweep_in(sweep.folder):
        code = sweep.run(trials, trials.fixed, sweep.jobs_at_a_time(), study=None)
        failed = any(trial.state in (FAILED, DIVERGED) for trial in trials.all())  # all of them were asked for
        _leave(code or (EXIT_FAILED if failed else 0))


def sweep_optuna(sweeper: Sweeper, arguments: Sequence[str]) -> None:
    """Search with Optuna.

    Raises:
        ConfigError: Optuna is missing, or its settings cannot be used.
        SystemExit: no trial was a success, too many failed, or a signal came.
    """
    try:
        from clip_train.sweeps.plots import draw_study
        from clip_train.sweeps.search_space import split_overrides
        from clip_train.sweeps.study import StudySettings, StudyTrials
    except ModuleNotFoundError as error:
        raise ConfigError("hydra/sweeper=optuna needs Optuna: pip install '.[sweep]' in the checkout") from error

    sweep = _Sweep(sweeper)
    settings = sweep.settings
    space, fixed = split_overrides([*sweep.params(), *arguments])
    prunes = not settings["pruner"]["_target_"].endswith("NopPruner")
    if prunes and OmegaConf.select(sweep.config, "eval.every") is None:
        log.warning("eval.every=null: nothing is evaluated before the end of a trial, so none can be pruned")
    with only_sweep_in(sweep.folder):
        study = StudySettings(
            storage=str(settings["storage"] or sweep.folder.absolute() / "study.journal"),
            name=str(settings["study_name"] or sweep.name),
            objective=sweep.objective,
            pruner=settings["pruner"],
        )
        trials = StudyTrials(study, settings["sampler"], space, settings["n_trials"], sweep.run_folder)
        n_jobs = sweep.jobs_at_a_time() or _JOBS_THROUGH_A_SCHEDULER
        try:
            code = sweep.run(trials, fixed, n_jobs, study=asdict(study))
        finally:
            for path in draw_study(trials.study, sweep.folder, sweep.objective.name):
                log.info("drew %s", path)
        complete = any(trial.state == COMPLETE for trial in trials.all())
        _leave(code or (0 if complete else EXIT_FAILED))


class _Sweep:
    """What both kinds of sweep have in common."""

    def __init__(self, sweeper: Sweeper) -> None:
        _log_to_console()
        _refuse_launched()
        self.settings = {key: _plain(value) for key, value in sweeper.settings.items()}
        _check_settings(self.settings)
        self.config, self.launcher = sweeper.config, sweeper.launcher
        self.groups = sweeper.hydra_context.config_loader.list_groups("")
        self.folder = Path(self.config.hydra.sweep.dir)
        self.name = self.folder.name
        has_validation = OmegaConf.select(self.config, "data.val.shards") is not None
        self.objective = Objective.of(self.settings["metric"], self.settings["direction"], has_validation)
        # W&B shows the runs of a group together; the jobs inherit the variable.
        os.environ.setdefault("WANDB_RUN_GROUP", self.name)

    def params(self) -> list[str]:
        """`hydra.sweeper.params`, as on the command line."""
        return [f"{key}={value}" for key, value in (self.settings["params"] or {}).items()]

    def run_folder(self, number: int) -> Path:
        """Of a trial; launchers/job.py puts it there."""
        return self.folder / f"{self.config.run_name or self.name}_{number}"

    def jobs_at_a_time(self) -> int | None:
        """As the config says, else as many as the launcher has places for; None if it is a scheduler."""
        return self.settings["n_jobs"] or self.config.hydra.launcher.get("n_jobs")

    def run(self, trials: Trials, fixed: list[str], n_jobs: int | None, study: Mapping[str, Any] | None) -> int:
        """Run the trials and write the results; returns the exit code."""
        self._refuse_other_settings(fixed)
        log.info("sweep %s: best is the trial with the %s %s", self.folder, _most(self.objective), self.objective.name)
        runner = SweepRunner(
            trials,
            self.objective,
            self.launcher.launch,
            _overrides_of_jobs(fixed, self.folder),
            n_jobs=n_jobs,
            max_failures=self.settings["max_failures"],
            study=study,
            changed=lambda: self._write_results(trials, fixed),
        )
        code = runner.run()
        self._write_results(trials, fixed)
        log.info("%s", _summary(trials, self.objective))
        return code

    def _write_results(self, trials: Trials, fixed: Sequence[str]) -> None:
        write_results(self.folder / "results.csv", trials.all())
        if best := best_trial(trials.all(), self.objective):
            write_best(self.folder, best, fixed, self.groups, self.objective)

    def _refuse_other_settings(self, fixed: Sequence[str]) -> None:
        """Trials of two settings do not belong into one comparison."""
        path = self.folder / "sweep.json"
        decisive = [override for override in fixed if not override.lstrip("+~").startswith(_MAY_CHANGE)]
        before = json.loads(path.read_text())["overrides"] if path.exists() else decisive
        if different := sorted({*before} ^ {*decisive}):
            what = ", ".join(different)
            raise ConfigError(
                f"{self.folder} holds a sweep with other settings ({what}): choose another hydra.sweep.dir"
            )
        content = {"name": self.name, "objective": asdict(self.objective), "overrides": decisive}
        write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def _refuse_launched() -> None:
    tasks = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if "SLURM_STEP_ID" in os.environ:
        tasks = max(tasks, int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")))
    if tasks > 1:
        raise ConfigError(
            "--multirun is one process that starts the others: leave torchrun or srun out, and give trainer.devices=N "
            "or hydra/launcher=slurm"
        )


def _check_settings(settings: Mapping[str, Any]) -> None:
    for key, least in (("n_jobs", 1), ("max_failures", 0), ("n_trials", 1)):
        value = settings.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ConfigError(f"hydra.sweeper.{key}={value} is not a whole number of at least {least}")


def _overrides_of_jobs(fixed: Sequence[str], folder: Path) -> list[str]:
    """Runs lie in the sweep's folder, and go on where they were stopped."""
    ours = ("output_dir=", "resume.from=")
    escaped = str(folder).replace("'", r"\'")
    kept = [override for override in fixed if not override.startswith(ours)]
    return [*kept, f"output_dir='{escaped}'", "resume.from=auto"]


def _summary(trials: Trials, objective: Objective) -> str:
    states = [trial.state for trial in trials.all()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    best = best_trial(trials.all(), objective)
    return f"trials: {counts}" + (f"; best is {best.number}: {' '.join(best.overrides)}" if best else "")


def _most(objective: Objective) -> str:
    return "highest" if objective.direction == "maximize" else "lowest"


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _log_to_console() -> None:
    logger = logging.getLogger("clip_train")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%X"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _leave(code: int) -> None:
    if code:
        raise SystemExit(code)
