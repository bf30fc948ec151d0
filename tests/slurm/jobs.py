"""Jobs of the test cluster, and waiting for what becomes of them."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from clip_train.training.callbacks.sample_log import read_sample_log
from tests.cli.runs import TINY

ROOT = Path(__file__).parents[2]
TRAIN, ARRAY_SWEEP = ROOT / "slurm" / "train.sbatch", ROOT / "slurm" / "array_sweep.sbatch"
# Every GPU of the cluster is pretended, so the model runs on the processor.
RUN = [*TINY, "experiment=demo", "data.val.shards=null", "data.num_workers=0", "data.sample_log=true"]
RUN += ["trainer.log_every=1"]


def slow(seconds: float) -> list[str]:
    """Settings that make every step last at least so long."""
    return ["loss._target_=tests.slurm.slow_loss.slow_contrastive_loss", f"+loss.seconds={seconds}"]


def job_environment() -> dict[str, str]:
    """With `clip-train` on the path, and the tests importable."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def sbatch(folder: Path, *arguments: str) -> str:
    """Submit from a folder, where the logs go too; returns the job's number."""
    command = ["sbatch", "--parsable", "--cpus-per-task=1", *arguments]
    done = subprocess.run(command, cwd=folder, env=job_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def job_info(job: str) -> dict[str, str]:
    """What SLURM knows of a job: JobState, Restarts, ExitCode ..."""
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=True)
    return dict(re.findall(r"(\w+)=(\S*)", shown.stdout))


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s"
        time.sleep(0.5)


def wait_until_over(job: str, folder: Path, state: str = "COMPLETED") -> int:
    """Wait for the end of a job, which must be in this state; returns how often it was restarted."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")
    wait_until(lambda: job_info(job)["JobState"] in over, f"the end of job {job}")
    info = job_info(job)
    assert info["JobState"] == state, f"{info}\n{logs(folder)}"
    return int(info["Restarts"])


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.glob("*.log"))


def wait_for_steps(run: Path, count: int) -> None:
    """Until the run has done so many steps."""
    wait_until(lambda: steps_done(run) >= count, f"step {count} of {run.name}")


def steps_done(run: Path) -> int:
    metrics = run / "metrics.csv"
    return len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0


def samples_of(run: Path) -> list[list[str]]:
    """What each step trained on, from the first step to the last."""
    log = read_sample_log(run / "samples")
    assert list(log) == [32 * step for step in range(1, len(log) + 1)]
    return list(log.values())
