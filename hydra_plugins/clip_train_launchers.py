"""`hydra/launcher=local` and `hydra/launcher=slurm`: Hydra takes plug-ins from this package only.

Every start of a program imports this file, so it imports little.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _JobLauncher(Launcher):
    """Turns overrides into jobs. The task function is not called: a job is a process of its own."""

    jobs: Any

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.cfg, self.composing = hydra_context, config, threading.Lock()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs to their end. Several threads may call this at the same time."""
        from clip_train.launchers.job import prepare_job

        folder = Path(str(self.cfg.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        numbered = enumerate(job_overrides, start=initial_job_idx)
        with self.composing:
            jobs = [prepare_job(self.context, self.cfg, overrides, number) for number, overrides in numbered]
        return self.jobs.run(jobs, folder)


class LocalLauncher(_JobLauncher):
    """Jobs on this machine; configs/hydra/launcher/local.yaml."""

    def __init__(self, n_jobs: int) -> None:
        from clip_train.launchers.local import LocalJobs

        self.jobs = LocalJobs(n_jobs)


class SlurmLauncher(_JobLauncher):
    """Jobs of SLURM; configs/hydra/launcher/slurm.yaml."""

    def __init__(self, **parameters: Any) -> None:
        from clip_train.launchers.slurm import SlurmJobs

        self.jobs = SlurmJobs(parameters)
