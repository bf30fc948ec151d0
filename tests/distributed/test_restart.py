"""A run that is started again at once, on nodes whose view of the folder is behind."""

import os

from clip_train.training.loggers.csv_logger import read_metrics
from tests.cli.warm_start import run_module


def test_ranks_that_find_different_checkpoints_look_again(tmp_path):
    done = run_module("tests.distributed.late_folder", [str(tmp_path)], os.environ, 300, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [row["samples_seen"] for row in read_metrics(tmp_path / "run" / "metrics.csv")[1] if row["train/loss"]]
    assert steps == ["32", "64", "96"]
