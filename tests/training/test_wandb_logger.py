import json
import os
import subprocess
from pathlib import Path

import pytest

from clip_train.errors import ConfigError
from clip_train.training.loggers.csv_logger import CsvLogger
from clip_train.training.loggers.wandb_files import last_step, logged_steps, read_records, wandb_files
from clip_train.training.loggers.wandb_logger import WandbLogger
from clip_train.training.run_folder import RunFolder
from tests.cli.warm_start import run_module


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))


def files_of(folder: Path) -> list[Path]:
    return wandb_files(folder, RunFolder(folder).wandb_run_id or "")


def test_steps_that_a_kill_has_taken_come_from_metrics_csv(tmp_path):
    rows = CsvLogger(str(tmp_path))
    for step in range(1, 6):
        rows.log_metrics({"train/loss": 1 / step, "samples_seen": 32 * step}, step=step)
        if step == 3:
            rows.log_metrics({"val/set/loss": 2.0, "samples_seen": 96}, step=3)
    logger = WandbLogger(str(tmp_path), project="test")  # knows none of them
    logger.resume_after(4, 128)
    logger.log_metrics({"train/loss": 1 / 5, "samples_seen": 160}, step=5)
    logger.finalize("success")
    (path,) = files_of(tmp_path)
    assert logged_steps(path) == [1, 2, 3, 4, 5]
    third = [record.history for record in read_records(path) if record.HasField("history")][2]
    values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in third.item}
    assert (values["train/loss"], values["val/set/loss"], values["samples_seen"]) == (1 / 3, 2.0, 96)


def test_checkpoints_as_artifacts(tmp_path):
    for name in ("samples_1.ckpt", "samples_2.ckpt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    logger = WandbLogger(str(tmp_path), project="test", log_checkpoints="best")
    logger.resume_after(0, 0)
    logger.checkpoint_saved(tmp_path / "samples_1.ckpt", best=False)
    logger.checkpoint_saved(tmp_path / "samples_2.ckpt", best=True)
    logger.checkpoint_saved(tmp_path / "samples_2.ckpt", best=True)
    logger.finalize("success")
    (path,) = files_of(tmp_path)
    artifacts = [record.artifact for record in read_records(path) if record.HasField("artifact")]
    assert [(set(artifact.aliases), artifact.type) for artifact in artifacts] == [
        ({"latest", "samples_2", "best"}, "model")
    ]
    assert list((tmp_path / "staging").rglob("*"))  # a copy, for when the run removes the checkpoint


BEGIN = """
import logging, os, signal, subprocess, sys
from clip_train.training.loggers.wandb_logger import WandbLogger
logging.basicConfig()
logger = WandbLogger(sys.argv[1], project="test")
logger.resume_after(0, 0)
logger.log_metrics({"train/loss": 1.0}, step=1)
"""
KILL_IT = """
for child in subprocess.check_output(["pgrep", "-P", str(os.getpid())], text=True).split():
    if os.path.exists(f"/proc/{child}/cmdline") and "wandb-core" in open(f"/proc/{child}/cmdline").read():
        os.kill(int(child), signal.SIGKILL)
"""
FAIL = """
logger.finalize("failed")
print("ended")
"""
GO_ON = """
for step in range(2, 100):
    logger.log_metrics({"train/loss": 1.0}, step=step)
logger.finalize("success")
print("went on")
"""


def run_python(program: str, folder: Path, **env: str) -> subprocess.CompletedProcess:
    others = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    (folder / "program.py").write_text(program)
    return run_module(str(folder / "program.py"), [str(folder)], {**others, **env}, timeout=300)


def test_w_and_b_dying_does_not_end_the_run(tmp_path):
    done = run_python(BEGIN + KILL_IT + GO_ON, tmp_path, WANDB_MODE="offline")
    assert "went on" in done.stdout, done.stderr
    assert done.stderr.count("W&B FAILED") == 1


def test_uploads_do_not_keep_a_run_that_failed(tmp_path):
    stop_it = KILL_IT.replace("SIGKILL", "SIGSTOP")  # as one that waits for its server
    done = run_python(BEGIN + stop_it + FAIL, tmp_path, WANDB_MODE="offline")
    assert "ended" in done.stdout, done.stderr
    assert "wandb sync" in done.stderr


def test_a_server_that_is_away_means_offline(tmp_path):
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "a", "WANDB_INIT_TIMEOUT": "3"}
    done = run_python(BEGIN + GO_ON, tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert "cannot be reached" in done.stderr
    assert last_step(files_of(tmp_path)) == 99


def test_what_may_be_logged(tmp_path):
    with pytest.raises(ConfigError, match="log_checkpoints=all is none of"):
        WandbLogger(str(tmp_path), project="test", log_checkpoints="all")  # pyright: ignore[reportArgumentType]
