"""Runs on a real SLURM cluster, and what happens to runs there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.jobs import (
    ARRAY_SWEEP,
    RUN,
    TRAIN,
    job_environment,
    job_info,
    logs,
    samples_of,
    sbatch,
    slow,
    steps_done,
    wait_for_steps,
    wait_until,
    wait_until_over,
)

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("limited_job")]

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")


@pytest.fixture(scope="session")
def limited_job(node, tmp_path_factory) -> tuple[str, Path]:
    """A job with more to do than fits into its time limit, which runs while the others are tested."""
    folder = tmp_path_factory.mktemp("limited")
    limits = ("--time=3", "--signal=USR1@60", "--nodelist=node1", "--ntasks-per-node=2", "--gpus-per-node=0")
    job = sbatch(folder, *limits, str(TRAIN), *RUN, *slow(0.3), "max_steps=400")
    return job, folder


def test_two_nodes_with_two_tasks_each(tmp_path, undisturbed):
    options = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    job = sbatch(tmp_path, *options, str(TRAIN), *RUN, "max_steps=10")
    assert wait_until_over(job, tmp_path) == 0
    run = tmp_path / "runs" / f"clip-train-{job}"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["complete"], summary["world_size"], summary["steps"]) == (True, 4, 10)
    assert len(list((run / "samples").glob("rank_*.csv"))) == 4
    assert samples_of(run) == undisturbed[:10]


def test_a_signal_saves_requeues_and_goes_on(tmp_path, undisturbed):
    job = sbatch(tmp_path, *TWO_NODES, str(TRAIN), *RUN, *slow(0.2), "max_steps=60", "data.num_workers=1")
    run = tmp_path / "runs" / f"clip-train-{job}"
    wait_for_steps(run, 8)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    assert wait_until_over(job, tmp_path) == 1
    assert "saved; back into the queue" in logs(tmp_path)
    assert samples_of(run) == undisturbed[:60]
    # Saved at the signal: no step was done twice, not even those since the last checkpoint of the cadence.
    assert "resuming from" in (run / "train.log").read_text()
    assert steps_done(run) == 60


def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint(node, tmp_path, undisturbed):
    job = sbatch(tmp_path, *TWO_NODES, str(TRAIN), *RUN, *slow(0.2), "max_steps=60", "checkpoint.every=5")
    run = tmp_path / "runs" / f"clip-train-{job}"
    wait_for_steps(run, 8)
    node("crash", "node2")
    wait_until(lambda: job_info(job)["Restarts"] == "1", "the requeue after a node's death")
    assert steps_done(run) < 60
    node("revive", "node2")
    assert wait_until_over(job, tmp_path) == 1
    assert samples_of(run) == undisturbed[:60]
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2


def test_an_array_sweep(tmp_path, undisturbed):
    (tmp_path / "sweep.txt").write_text("optim.lr=1e-4 max_steps=30\n" * 2 + "optim.lr=5e-4 max_steps=500\n")
    options = ("--array=1-3", "--gpus-per-node=0", str(ARRAY_SWEEP), "sweep.txt")
    array = sbatch(tmp_path, *options, *RUN, *slow(0.3))
    runs = [tmp_path / "runs" / f"clip-sweep-{array}_{line}" for line in (1, 2, 3)]
    for run in runs[1:]:
        wait_for_steps(run, 3)
    subprocess.run(["scancel", "--signal=TERM", f"{array}_2"], check=True)
    subprocess.run(["scancel", f"{array}_3"], check=True)
    assert wait_until_over(f"{array}_1", tmp_path) == 0
    assert wait_until_over(f"{array}_2", tmp_path) == 1
    assert wait_until_over(f"{array}_3", tmp_path, "CANCELLED") == 0
    assert samples_of(runs[0]) == samples_of(runs[1]) == undisturbed[:30]
    assert 3 <= steps_done(runs[2]) < 500


def test_a_multirun_through_submitit(limited_job, tmp_path, undisturbed):
    launcher = ["hydra/launcher=slurm", "hydra.launcher.ntasks_per_node=2", "hydra.launcher.cpus_per_task=1"]
    sweep = [*RUN, *slow(0.3), "optim.lr=1e-4,5e-4", "max_steps=30", f"output_dir={tmp_path}", "run_name=sweep"]
    command = [sys.executable, "-m", "clip_train.commands.train", "--multirun", *launcher, *sweep]
    process = subprocess.Popen(command, cwd=tmp_path, env=job_environment())
    wait_until(lambda: len(list(tmp_path.rglob("metrics.csv"))) == 2, "the start of two runs")
    runs = [path.parent for path in tmp_path.rglob("metrics.csv")]
    for run in runs:
        wait_for_steps(run, 3)
    queue = subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=True)
    first = min(set(queue.stdout.split()) - {limited_job[0]})
    subprocess.run(["scancel", "--signal=USR1", first], check=True)
    assert process.wait(900) == 0
    assert int(job_info(first)["Restarts"]) == 1
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["complete"], summary["world_size"]) == (True, 2)
        assert samples_of(run) == undisturbed[:30]


def test_the_time_limit_saves_requeues_and_goes_on_until_the_length_is_reached(limited_job, undisturbed):
    job, folder = limited_job
    assert wait_until_over(job, folder) >= 1
    run = folder / "runs" / f"clip-train-{job}"
    assert samples_of(run) == undisturbed
    assert json.loads((run / "summary.json").read_text())["complete"]
    assert "SIGUSR1: the run stops after this step" in logs(folder)
    assert [path.name for path in (folder / "runs").iterdir()] == [run.name]
