"""What W&B is given, read from the files that `wandb sync` would upload."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clip_train.training.loggers.csv_logger import read_metrics
from clip_train.training.loggers.wandb_files import read_records, wandb_files
from clip_train.training.run_folder import RunFolder
from tests.cli.runs import TINY, clip_train, start_clip_train
from tests.cli.warm_start import WarmProcess

RUN = [*TINY, "run_name=run", "data.val.shards=null", "trainer.log_every=1", "logger=[csv,wandb]"]


def history(path: Path) -> list[dict]:
    """The rows of a W&B file."""
    rows = (record.history for record in read_records(path) if record.HasField("history"))
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in rows]


def run_record(path: Path):
    return next(record.run for record in read_records(path) if record.HasField("run"))


def test_killed_and_resumed_each_step_is_there_once_under_one_id(tmp_path):
    arguments = [*RUN, f"output_dir={tmp_path}", "max_steps=24", "checkpoint.every=8"]
    process = start_clip_train(*arguments, WANDB_MODE="offline")
    folder = tmp_path / "run"
    wait_for_step(process, folder / "metrics.csv", 11)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = clip_train(*arguments, "resume=auto", WANDB_MODE="offline")
    assert resumed.returncode == 0, resumed.stderr

    run_id = RunFolder(folder).wandb_run_id
    assert run_id
    files = wandb_files(folder, run_id)
    assert len(files) == 2
    assert [run_record(path).run_id for path in files] == [run_id, run_id]
    assert all(run_record(path).resume for path in files)  # `wandb sync` appends to the run
    sent = [row for path in files for row in history(path)]
    kept = {int(row["step"]): row for row in read_metrics(folder / "metrics.csv")[1]}
    assert [row["_step"] for row in sent] == list(range(1, 25)) == sorted(kept)
    for row in sent:
        assert row["samples_seen"] == 32 * row["_step"]
        assert row["train/loss"] == pytest.approx(float(kept[row["_step"]]["train/loss"]), rel=1e-12)
    listed = subprocess.run(
        [Path(sys.executable).parent / "wandb", "sync", "--dry-run", str(folder / "wandb")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Would sync 2 run(s)" in listed.stdout + listed.stderr


def wait_for_step(process: WarmProcess, path: Path, step: int) -> None:
    while not path.exists() or int((read_metrics(path)[1] or [{"step": "0"}])[-1]["step"]) < step:
        assert process.poll() is None, f"the run ended with {process.returncode}"
        time.sleep(0.02)


def test_config_code_version_group_and_axis(tmp_path):
    done = clip_train(*RUN, f"output_dir={tmp_path}", "max_steps=2", "logger.wandb.group=mine", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    folder = RunFolder(tmp_path / "run")
    (path,) = wandb_files(folder.path, folder.wandb_run_id or "")
    run = run_record(path)
    assert (run.run_group, run.display_name, run.project) == ("mine", "run", "clip_train")
    records = list(read_records(path))
    items = [item for record in records if record.HasField("config") for item in record.config.update]
    config = {item.key: json.loads(item.value_json) for item in items}
    assert config["batch_size"] == 32
    assert {"torch", "clip_train"} <= config["environment"].keys()
    axes = {record.metric.glob_name: record.metric.step_metric for record in records if record.HasField("metric")}
    assert axes["*"] == "samples_seen"
    assert any(record.HasField("exit") for record in records)  # finished in good order
