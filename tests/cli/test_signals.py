"""Signals at awkward moments: before training, while a checkpoint is being written, and more than one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip_train.training.loggers.csv_logger import read_metrics
from tests.cli.runs import TINY, clip_train, start_clip_train
from tests.cli.warm_start import run_module

COMMON = [*TINY, "data.val.shards=null", "data.num_workers=0", "trainer.log_every=1"]
SHORT = [*COMMON, "max_steps=30"]


def start_cold(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "clip_train.commands.train", *arguments]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def wait_until(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_a_signal_before_training_begins(tmp_path, number):
    process = start_cold(*SHORT, f"output_dir={tmp_path}", "run_name=run")
    wait_until(lambda: handles(process.pid, signal.SIGUSR1))  # installed last; Python has one for SIGINT itself
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()  # the handlers were there first
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    assert errors.startswith(f"{number.name}: the run stops after this step, with a checkpoint")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["complete"], summary["stopped_by_signal"], summary["samples_seen"]) == (False, True, 0)

    if number == signal.SIGUSR1:
        resumed = clip_train(*SHORT, f"output_dir={tmp_path}", "run_name=run", "resume=auto")
        assert resumed.returncode == 0, resumed.stderr
        assert len(read_metrics(tmp_path / "run" / "metrics.csv")[1]) == 30


def test_signals_without_end_do_not_break_the_last_checkpoint(tmp_path):
    process = start_clip_train(*SHORT, f"output_dir={tmp_path}", "run_name=run")
    wait_until(lambda: (tmp_path / "run" / "metrics.csv").exists())
    while process.poll() is None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
        time.sleep(0.005)
    assert process.returncode == 75, process.communicate()[1]
    resumed = clip_train(*SHORT, f"output_dir={tmp_path}", "run_name=run", "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed" in resumed.stdout
    assert len(read_metrics(tmp_path / "run" / "metrics.csv")[1]) == 30


def test_the_second_sigint_stops_at_once(tmp_path):
    slow = ["loss._target_=tests.slurm.slow_loss.slow_contrastive_loss", "+loss.seconds=600"]
    slow += [f"+loss.begun={tmp_path / 'begun'}"]
    process = start_clip_train(*SHORT, *slow, f"output_dir={tmp_path}", "run_name=run")
    wait_until(lambda: (tmp_path / "begun").exists())
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # the step lasts ten minutes
    process.send_signal(signal.SIGINT)
    assert process.wait(100) in (1, 130)  # Lightning's way out, or ours if that takes long


def test_a_sweep_hands_the_signal_to_all_its_jobs(tmp_path):
    slow = ["loss._target_=tests.slurm.slow_loss.slow_contrastive_loss", "+loss.seconds=0.3"]
    sweep = ["max_steps=1000,2000,3000", "hydra.launcher.n_jobs=2", f"output_dir={tmp_path}"]
    process = start_clip_train("--multirun", *COMMON, *slow, *sweep)
    wait_until(lambda: len(list(tmp_path.rglob("metrics.csv"))) == 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    summaries = [json.loads(path.read_text()) for path in tmp_path.rglob("summary.json")]
    assert [summary["stopped_by_signal"] for summary in summaries] == [True, True]  # and the third was not begun


def test_lightning_installs_no_handlers_of_its_own():
    # In a job of SLURM its default is to save and requeue inside a handler.
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job", "SLURM_NODELIST": "localhost", "SLURM_NTASKS": "1"}
    job |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    program = Path(__file__).with_name("lightning_handlers.py")
    done = run_module(str(program), [], {**os.environ, **job}, timeout=600)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ours"), done.stderr


def test_an_evaluation_that_a_signal_came_before_is_made_up(tmp_path):
    run = [*COMMON, "max_steps=6", "eval.every=4", "data.val.shards=demo:emoji/val_concept/*.tar", "eval.picture=false"]
    run += [f"output_dir={tmp_path}", "run_name=run"]
    # It comes in step 3, is seen before step 4, and ends the run after it.
    stopped = clip_train(*run, "loss._target_=tests.training.odd_losses.signal_at_call", "+loss.call=3")
    assert stopped.returncode == 75, stopped.stderr
    assert evaluated_at(tmp_path / "run") == []
    resumed = clip_train(*run, "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert evaluated_at(tmp_path / "run") == [4 * 32, 6 * 32]
    again = clip_train(*run, f"resume={tmp_path}/run/checkpoints/samples_00000000000128.ckpt")  # which has metrics now
    assert again.returncode == 0, again.stderr
    assert evaluated_at(tmp_path / "run") == [4 * 32, 6 * 32]


def evaluated_at(run: Path) -> list[int]:
    return [int(row["samples_seen"]) for row in read_metrics(run / "metrics.csv")[1] if not row["train/loss"]]
