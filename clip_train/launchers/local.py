"""The jobs of a sweep on this machine, some of them at a time."""

import os
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from hydra.core.utils import JobReturn

from clip_train.commands.program import EXIT_RESUMABLE
from clip_train.launchers.job import Job, job_return, run_job
from clip_train.training.signals import stop_requested


class LocalJobs:
    """Runs jobs in processes of their own, at most `n_jobs` at a time, whichever threads bring them.

    With more than one at a time, each has its share of the GPUs and processors, and its output goes to
    `<sweep folder>/<number>.log`.

    Args:
        n_jobs: how many at a time.
    """

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs
        self._places: queue.Queue[int] = queue.Queue()
        for place in range(n_jobs):
            self._places.put(place)

    def run(self, jobs: Sequence[Job], folder: Path) -> list[JobReturn]:
        """Run the jobs; one that fails does not end the others. After a signal no more are begun.

        Args:
            jobs: what to run.
            folder: of the sweep.
        """
        with ThreadPoolExecutor(self.n_jobs) as pool:
            return list(pool.map(lambda job: self._run(job, folder), jobs))

    def _run(self, job: Job, folder: Path) -> JobReturn:
        with self._place() as place:
            if stop_requested():
                return job_return(job, EXIT_RESUMABLE)
            if self.n_jobs == 1:
                return job_return(job, run_job(job.arguments))
            log = folder / f"{job.number}.log"
            with open(log, "ab") as output:
                code = run_job(job.arguments, {**os.environ, **_share(place, self.n_jobs)}, output)
            return job_return(job, code, log)

    @contextmanager
    def _place(self) -> Iterator[int]:
        place = self._places.get()
        try:
            yield place
        finally:
            self._places.put(place)


def _share(place: int, places: int) -> dict[str, str]:
    """Variables that give a job its share of the machine."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // places)))}
    if count := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(gpu) for gpu in range(count)]
        share["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place::places] or [gpus[place % count]])
    return share
