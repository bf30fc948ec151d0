"""Whole sweeps of small models: searched, pruned, killed, stopped, gone on with."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from clip_train.sweeps.objective import Objective
from clip_train.sweeps.study import StudySettings, StudyTrials
from clip_train.sweeps.trial import TrialFile
from clip_train.training.loggers.csv_logger import read_metrics
from clip_train.training.loggers.wandb_files import read_records
from tests.cli.runs import TINY, clip_train, start_clip_train
from tests.cli.warm_start import WarmProcess


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def wait_for(condition: Callable[[], object], process: WarmProcess) -> None:
    end = time.monotonic() + 400
    while not condition():
        assert process.poll() is None, f"the sweep ended with {process.returncode}"
        assert time.monotonic() < end, "this did not come about in time"
        time.sleep(0.02)


def results(folder: Path) -> dict[int, dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return {int(row["number"]): row for row in csv.DictReader(file)}


def losses(run: Path) -> list[str]:
    return [row["train/loss"] for row in read_metrics(run / "metrics.csv")[1] if row["train/loss"]]


def test_a_search_prunes_is_killed_and_goes_on(tmp_path, make_shards):
    # With a logit scale of 100 the loss of an untrained model is far above the bound, with 1 it is below.
    train, val = make_shards([64, 40])
    arguments = [
        "--multirun",
        *TINY,
        f"data.train.shards={train}",
        f"data.val.shards={val}",
        "data.num_workers=0",
        "max_steps=60",
        "checkpoint.every=5",
        "trainer.log_every=1",
        "eval.every=30",
        "optim.lr=tag(log, interval(1e-7, 1e-6))",
        "model.init_logit_scale=0,4.6",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=3",
        "hydra/sweeper/sampler=random",
        "hydra/sweeper/pruner=threshold",
        "hydra.sweeper.pruner.upper=6",
        "hydra.sweeper.metric=val/shards/loss",
        "hydra.launcher.n_jobs=2",
        f"output_dir={tmp_path}",
        "run_name=search",
    ]
    folder = tmp_path / "search"
    process = start_clip_train(*arguments)
    wait_for(lambda: list(folder.glob("search_*/checkpoints/*.ckpt/manifest.json")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    done = clip_train(*arguments, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [path.read_text() for path in folder.glob("search_*/train.log")]
    assert any("resuming from" in log for log in logs)
    rows = results(folder)
    assert sorted(rows) == [0, 1, 2]
    assert len({row["optim.lr"] for row in rows.values()}) == 3
    for number, row in rows.items():
        scale = row["model.init_logit_scale"]
        assert row["state"] == {"0": "complete", "4.6": "pruned"}[scale]
        # All ranks agree at the start of the step after the evaluation.
        assert row["samples_seen"] == {"0": str(60 * 32), "4.6": str(31 * 32)}[scale]
        assert losses(folder / f"search_{number}") and Path(row["run_folder"]) == folder / f"search_{number}"
    assert {row["state"] for row in rows.values()} == {"complete", "pruned"}
    complete = {number: float(row["metric"]) for number, row in rows.items() if row["state"] == "complete"}
    best = min(complete, key=lambda number: complete[number])
    assert f"Trial {best}: val/shards/loss" in (folder / "experiment" / "best.yaml").read_text()

    again = clip_train(*arguments, timeout=900)  # nothing is left to do
    assert again.returncode == 0, again.stderr
    assert results(folder) == rows


def test_a_grid_is_stopped_and_goes_on_and_its_best_trains_again(tmp_path):
    arguments = [
        "--multirun",
        *TINY,
        "data.val.shards=null",
        "logger=[csv,wandb]",
        "trainer.log_every=1",
        "max_steps=40",
        "optim.warmup=0",
        "optim.lr=1e-3,1e-9",
        f"output_dir={tmp_path}",
        "run_name=grid",
    ]
    folder = tmp_path / "grid"
    process = start_clip_train(*arguments)
    metrics = folder / "grid_0" / "metrics.csv"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(400) == 75
    assert [row["state"] for row in results(folder).values()] == ["interrupted", "waiting"]

    done = clip_train(*arguments, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in (folder / "grid_0" / "train.log").read_text()
    rows = results(folder)
    assert [row["state"] for row in rows.values()] == ["complete", "complete"]
    assert [row["samples_seen"] for row in rows.values()] == [str(40 * 32)] * 2
    assert float(rows[0]["metric"]) < float(rows[1]["metric"])  # the last training loss, as nothing is validated
    files = [*folder.glob("grid_*/wandb/offline-run-*/*.wandb")]
    runs = [record.run for path in files for record in read_records(path) if record.HasField("run")]
    assert {run.run_group for run in runs} == {"grid"}

    finished = {path: path.stat().st_mtime_ns for path in folder.glob("grid_*/summary.json")}
    again = clip_train(*arguments, timeout=900)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.glob("grid_*/summary.json")} == finished

    where = ["--config-dir", str(folder), "experiment=best", f"output_dir={tmp_path}", "run_name=again"]
    best = clip_train(*where, timeout=900)
    assert best.returncode == 0, best.stderr
    assert losses(tmp_path / "again") == losses(folder / "grid_0")


def test_all_ranks_end_a_pruned_run(tmp_path, make_shards):
    run = tmp_path / "run"
    pruner = {"_target_": "optuna.pruners.ThresholdPruner", "upper": 0}
    study = StudySettings(str(tmp_path / "study.journal"), "one", Objective(("val/shards/loss",), "minimize"), pruner)
    trial = StudyTrials(study, {"_target_": "optuna.samplers.RandomSampler"}, {}, 1, lambda number: run).next()
    assert trial
    TrialFile(run).write(trial, asdict(study))
    (shards,) = make_shards([40])
    data = [f"data.train.shards={shards}", f"data.val.shards={shards}", "data.num_workers=0"]
    where = ["max_steps=9", "eval.every=3", f"output_dir={tmp_path}", "run_name=run"]
    done = clip_train(*TINY, *data, *where, timeout=900, ranks=2)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["pruned"], summary["complete"], summary["steps"]) == (True, False, 4)
    assert list(study.open().trials[0].intermediate_values) == [1]


def test_what_a_sweep_cannot_do_is_said_before_it_starts(tmp_path):
    common = ["--multirun", *TINY, f"output_dir={tmp_path}", "run_name=sweep"]
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2"}
    for arguments, env, message in [
        (["hydra/sweeper=optuna", "optim.lr=1e-3"], {}, "hydra/sweeper=optuna has nothing to search"),
        (["optim.lr=interval(1e-4, 1e-3)"], {}, "hydra/sweeper=optuna"),
        (["optim.lr=1,2", "hydra.sweeper.n_jobs=0"], {}, "hydra.sweeper.n_jobs=0 is not a whole number of at least 1"),
        (["optim.lr=1,2"], torchrun, "leave torchrun or srun out"),
    ]:
        done = clip_train(*common, *arguments, **env)
        assert done.returncode == 2, done.stdout + done.stderr
        assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_the_wandb_sweep_of_the_docs_starts_clip_train(tmp_path):
    """The command is put together by wandb's own code, as its agent does; the agent itself needs W&B's server."""
    page = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text()
    sweep = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    chosen = {"optim.lr": {"value": 3e-4}, "model": {"value": "vit_b_16"}}
    assert sweep["parameters"].keys() == chosen.keys()
    macros = {"${env}": ["/usr/bin/env"], "${program}": [sweep["program"]]}
    macros["${args_no_hyphens}"] = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    command = [word for part in create_sweep_command(sweep["command"]) for word in macros.get(part, [part])]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "WANDB_RUN_ID": "abc123"}
    done = subprocess.run([*command, "--cfg", "job", "--resolve"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cfg = yaml.safe_load(done.stdout)
    assert (cfg["optim"]["lr"], cfg["model_name"], cfg["run_name"]) == (3e-4, "vit_b_16", "abc123")
    assert list(cfg["logger"]) == ["csv", "wandb"]
