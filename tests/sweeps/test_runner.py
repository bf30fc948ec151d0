"""The loop around trials, with a launcher that writes what a run would leave."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus

from clip_train.errors import ConfigError
from clip_train.sweeps.grid import GridTrials
from clip_train.sweeps.objective import Objective
from clip_train.sweeps.runner import SweepRunner, only_sweep_in
from clip_train.sweeps.trial import COMPLETE, DIVERGED, FAILED, INTERRUPTED, PRUNED, WAITING, Trial, TrialFile
from clip_train.training import signals


class Runs:
    """Runs that end with these exit codes, by the value of `x`; 'pruned' is one that its study ended."""

    def __init__(self, folder: Path, codes: dict[int, int | str]) -> None:
        self.folder, self.codes = folder, codes
        self.calls: list[tuple[int, int]] = []

    def launch(self, jobs, number):
        self.calls.append((number, len(jobs)))
        return [self._run(overrides, number + place) for place, overrides in enumerate(jobs)]

    def _run(self, overrides, number):
        x = int(overrides[-1].removeprefix("x="))
        code = self.codes.get(x, 0)
        if not isinstance(code, int) or code == 0:
            summary = {"complete": code == 0, "pruned": code == "pruned", "metrics": {"train/loss": x}}
            (self.folder / f"run_{number}" / "summary.json").write_text(json.dumps(summary))
            code = 0
        job = JobReturn(status=JobStatus.FAILED if code else JobStatus.COMPLETED)
        job.return_value = SystemExit(code) if code else None
        return job


def sweep(folder: Path, runs: Runs, values: str, n_jobs: int | None = 1, max_failures: int | None = None):
    trials = GridTrials([f"x={values}"], lambda number: folder / f"run_{number}")
    objective = Objective(("train/loss",), "minimize")
    settings = {"n_jobs": n_jobs, "max_failures": max_failures, "study": None, "changed": lambda: None}
    code = SweepRunner(trials, objective, runs.launch, ["max_steps=1"], **settings).run()
    return code, [trial.state for trial in trials.all()]


def test_failed_and_pruned_trials_do_not_end_a_sweep_and_only_failed_ones_run_again(tmp_path):
    runs = Runs(tmp_path, {1: 2, 2: "pruned", 3: 70})
    assert sweep(tmp_path, runs, "0,1,2,3") == (0, [COMPLETE, FAILED, PRUNED, DIVERGED])
    runs = Runs(tmp_path, {})
    assert sweep(tmp_path, runs, "0,1,2,3") == (0, [COMPLETE, COMPLETE, PRUNED, COMPLETE])
    assert runs.calls == [(1, 1), (3, 1)]


def test_too_many_failures_end_it(tmp_path):
    runs = Runs(tmp_path, {0: 1, 1: 1})
    assert sweep(tmp_path, runs, "0,1,2", max_failures=1) == (1, [FAILED, FAILED, WAITING])


def test_a_stopped_run_ends_it_resumable(tmp_path):
    runs = Runs(tmp_path, {1: 75})
    assert sweep(tmp_path, runs, "0,1,2") == (75, [COMPLETE, INTERRUPTED, WAITING])


def test_a_scheduler_gets_all_that_is_left_in_few_calls(tmp_path):
    assert sweep(tmp_path, Runs(tmp_path, {}), "0,1,2,3,4", n_jobs=None)[0] == 0
    (tmp_path / "run_0" / "summary.json").unlink()
    for number in (3, 4):
        (tmp_path / f"run_{number}" / "summary.json").unlink()
    runs = Runs(tmp_path, {})
    assert sweep(tmp_path, runs, "0,1,2,3,4", n_jobs=None) == (0, [COMPLETE] * 5)
    assert runs.calls == [(0, 1), (3, 2)]


def test_trials_at_a_time(tmp_path):
    both_there = threading.Barrier(2, timeout=60)

    class Waiting(Runs):
        def launch(self, jobs, number):
            both_there.wait()
            return super().launch(jobs, number)

    assert sweep(tmp_path, Waiting(tmp_path, {}), "0,1,2,3", n_jobs=2) == (0, [COMPLETE] * 4)


def test_a_folder_of_another_grid_is_refused(tmp_path):
    sweep(tmp_path, Runs(tmp_path, {}), "0,1")
    with pytest.raises(ConfigError, match=r"run_1 is a trial with x=1, not x=5: choose another hydra.sweep.dir"):
        sweep(tmp_path, Runs(tmp_path, {}), "0,5")


def test_one_sweep_at_a_time_in_a_folder(tmp_path):
    with (
        only_sweep_in(tmp_path),
        pytest.raises(ConfigError, match="another process runs the sweep"),
        only_sweep_in(tmp_path),
    ):
        pass
    with only_sweep_in(tmp_path):
        pass


def test_a_run_left_by_a_killed_sweep_is_waited_for(tmp_path):
    trials = GridTrials(["x=0,1"], lambda number: tmp_path / f"run_{number}")
    file = TrialFile(tmp_path / "run_0")
    file.write(trials.all()[0], None)
    assert file.lock()
    runs = Runs(tmp_path, {})
    thread = threading.Thread(target=sweep, args=(tmp_path, runs, "0,1"))
    thread.start()
    thread.join(1)
    assert thread.is_alive() and not runs.calls
    file.unlock()
    thread.join(60)
    assert runs.calls == [(0, 1), (1, 1)]


def test_waiting_for_such_a_run_ends_with_a_signal(tmp_path, monkeypatch):
    trials = GridTrials(["x=0,1"], lambda number: tmp_path / f"run_{number}")
    file = TrialFile(tmp_path / "run_0")
    file.write(trials.all()[0], None)
    assert file.lock()
    monkeypatch.setattr(signals, "_received", None)
    stop = threading.Timer(1, signals._note, [signal.SIGTERM, None])  # while the sweep waits
    stop.start()
    runs = Runs(tmp_path, {})
    assert sweep(tmp_path, runs, "0,1") == (75, [INTERRUPTED, WAITING])
    assert not runs.calls


def test_a_lock_given_back_is_free_although_a_child_still_has_the_file_open(tmp_path):
    file = TrialFile(tmp_path / "run_0")
    file.write(Trial(0, (), tmp_path / "run_0"), None)
    assert file.lock()
    assert file._lock
    os.set_inheritable(file._lock.fileno(), True)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        assert not TrialFile(tmp_path / "run_0").lock()
        file.unlock()
        again = TrialFile(tmp_path / "run_0")
        assert again.lock()
        again.unlock()
    finally:
        child.communicate(b"\n")
