"""The jobs of a sweep as one job array of SLURM, submitted through submitit.

submitit writes the script, submits the array and carries results home. Time limits are ours to handle: its own
handler requeues a job the moment the signal comes, and so kills it before it has saved. Here `clip-train` saves and
ends with 75 before its job is requeued. Nor is sacct needed: a job is over when it has a result or is no longer in
the queue.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn

from clip_train.commands.program import EXIT_RESUMABLE
from clip_train.errors import ConfigError
from clip_train.launchers.job import Job, job_return, run_job
from clip_train.training.signals import install_handlers, stop_requested

_NO_RESULT = 1
_SECONDS_BETWEEN_LOOKS = 10
_ATTEMPTS, _SECONDS_BETWEEN_ATTEMPTS = 6, 5


class SlurmJobs:
    """Submits jobs and waits for them.

    Args:
        parameters: of `submitit.SlurmExecutor`, most of them called as sbatch calls them.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.parameters = dict(parameters)

    def run(self, jobs: Sequence[Job], folder: Path) -> list[JobReturn]:
        """Submit the jobs as an array and wait until all are done. After a signal they are cancelled.

        Args:
            jobs: what to run.
            folder: of the sweep; scripts and logs go to its `slurm/`.

        Raises:
            ConfigError: there is no submitit, or no SLURM, or sbatch refuses the parameters.
        """
        submitted = self._submit([job.arguments for job in jobs], folder / "slurm")
        codes = _wait({job.job_id: Path(job.paths.result_pickle) for job in submitted})
        logs = [Path(job.paths.stdout) for job in submitted]
        return [job_return(job, codes[its.job_id], log) for job, its, log in zip(jobs, submitted, logs)]

    def _submit(self, arguments: list[list[str]], folder: Path) -> list[Any]:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError("hydra/launcher=slurm needs submitit: pip install '.[slurm]' in the checkout") from error
        parameters = {name: value for name, value in self.parameters.items() if value is not None}
        lead = parameters.pop("signal_delay_s")
        more = {"signal": f"USR1@{lead}", "requeue": True, **parameters.pop("additional_parameters", {})}
        try:
            executor = submitit.SlurmExecutor(folder)
            executor.update_parameters(
                **parameters,
                stderr_to_stdout=True,
                additional_parameters=more,
                # Ranks end one after the other with 75; but one that died must not keep the others waiting.
                srun_args=["--kill-on-bad-exit=0", "--wait=300"],
            )
            return executor.map_array(run_task, arguments)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"hydra/launcher=slurm: {' '.join(str(error).split())}") from error


def run_task(arguments: list[str]) -> int:
    """One rank of a job, in the process that submitit started; returns the exit code of `clip-train`.

    Raises:
        RuntimeError: a rank other than the first failed, or the job was to be requeued and was not.
    """
    install_handlers()
    restarted = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    code = run_job(arguments, {**os.environ, "CLIP_TRAIN_RESTARTED": "1"} if restarted else None)
    first = os.environ.get("SLURM_PROCID", "0") == "0"
    if code == EXIT_RESUMABLE:
        if first:
            _requeue()
        time.sleep(300)  # until the requeue ends this process
        raise RuntimeError("saved, but the job was not requeued")
    if code and not first:
        raise RuntimeError(f"clip-train ended with {code}")
    return code


def _requeue() -> None:
    """Requeue this job, unless it is being cancelled."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # the array itself has the number of one of its tasks
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    state = _ask_patiently("squeue", "-h", "-j", job, "-o", "%T")
    if state != "RUNNING":
        print(f"saved; not requeued, as the job is {state or 'unknown to squeue'}", flush=True)
        return
    print("saved; back into the queue", flush=True)
    if _ask_patiently("scontrol", "requeue", job) is None:
        print(f"SLURM did not take the job back: scontrol requeue {job}", flush=True)


def _ask_patiently(*command: str) -> str | None:
    """What a command of SLURM's prints; None if it fails and fails again: the controller may be busy for a minute."""
    for attempt in range(_ATTEMPTS):
        time.sleep(_SECONDS_BETWEEN_ATTEMPTS if attempt else 0)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
        print(f"{command[0]}: {done.stderr.strip()}", file=sys.stderr, flush=True)
    return None


def _wait(results: Mapping[str, Path]) -> dict[str, int]:
    """The exit code of each job."""
    codes: dict[str, int] = {}
    next_look, missed = 0.0, set[str]()
    while len(codes) < len(results):
        for job in results.keys() - codes.keys():
            if results[job].exists():
                codes[job] = _read_result(results[job])
        if stop_requested():
            subprocess.run(["scancel", *(results.keys() - codes.keys())], check=False)
            return {job: codes.get(job, EXIT_RESUMABLE) for job in results}
        if time.monotonic() > next_look and (queued := _queued_jobs()) is not None:
            gone = results.keys() - codes.keys() - queued
            codes |= dict.fromkeys(gone & missed, _NO_RESULT)  # twice, as a result may come late to this machine
            next_look, missed = time.monotonic() + _SECONDS_BETWEEN_LOOKS, gone
        time.sleep(0.5)
    return codes


def _read_result(path: Path) -> int:
    from submitit.core.utils import pickle_load

    outcome, result = pickle_load(path)
    if outcome == "success":
        return result
    print(result, file=sys.stderr)
    return _NO_RESULT


def _queued_jobs() -> set[str] | None:
    """This user's jobs that are not over; None if SLURM does not answer."""
    queue = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=False)
    return set(queue.stdout.split()) if queue.returncode == 0 else None
