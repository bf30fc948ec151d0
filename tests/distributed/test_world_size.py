"""The number of processes decides how fast a run goes, not what it learns."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from clip_train.checkpoints.folder import read_weights
from clip_train.training.csv_logger import read_metrics
from tests.cli.runs import train_tiny

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")

STEPS, BATCH = 6, 48
RANKS = (1, 2, 3, 4)
WAYS = list(itertools.product([None, 2, 4], ["gather", "ring"], ["false", "true"]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[tuple, Path]:
    """Run folders by (ranks, micro-batches per step, exchange, checkpointing of activations)."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for ranks in RANKS:
        arguments = []
        for micro_batches, exchange, checkpointing in WAYS:
            name = f"{ranks}-{micro_batches}-{exchange}-{checkpointing}"
            micro_batch = "null" if micro_batches is None else -(-BATCH // ranks // micro_batches)
            arguments.append(
                f"{name} batch_size={BATCH} max_steps={STEPS} micro_batch_size={micro_batch}"
                f" loss.exchange={exchange} model.grad_checkpointing={checkpointing}"
            )
            found[ranks, micro_batches, exchange, checkpointing] = folder / name
        command = [*TORCHRUN, f"--nproc-per-node={ranks}", "-m", "tests.distributed.train_many", str(folder)]
        done = subprocess.run(
            [*command, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return found


def metric(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_metrics(run / "metrics.csv")[1]]


def parameters(run: Path) -> dict[str, Tensor]:
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    return read_weights(checkpoint)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("micro_batches", "exchange", "checkpointing"), WAYS)
def test_losses_and_parameters_do_not_depend_on_how_a_batch_is_computed(
    runs, ranks, micro_batches, exchange, checkpointing
):
    reference, run = runs[1, None, "gather", "false"], runs[ranks, micro_batches, exchange, checkpointing]
    expected = metric(reference, "train/loss")
    assert len(expected) == STEPS and expected[-1] < expected[0]
    assert metric(run, "train/loss") == pytest.approx(expected, rel=1e-5)
    # AdamW would hide a constant factor.
    assert metric(run, "train/grad_norm") == pytest.approx(metric(reference, "train/grad_norm"), rel=1e-4)
    found = parameters(run)
    for name, parameter in parameters(reference).items():
        # Key biases have no influence: they start at zero, and rounding alone moves them.
        assert (found[name] - parameter).norm() <= 1e-5 * (parameter.norm() + 1), name
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["world_size"], summary["samples_seen"]) == (ranks, BATCH * STEPS)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gradients_are_synchronised_once_per_step(runs, ranks):
    plain, cached = (
        json.loads((runs[ranks, micro_batches, "gather", "false"] / "exchanges.json").read_text())
        for micro_batches in (None, 4)
    )
    assert all(plain)
    assert cached == [0, 0, 0, plain[0], 0, 0, 0, plain[1]]


def test_recalls_do_not_depend_on_the_number_of_ranks(tmp_path):
    metrics = []
    for devices in (1, 2):
        train_tiny(tmp_path, str(devices), "max_steps=4", f"trainer.devices={devices}")
        metrics.append(json.loads((tmp_path / str(devices) / "summary.json").read_text())["metrics"])
    name = "val/unseen_style/image_to_text_recall@10"
    assert metrics[0][name] == pytest.approx(metrics[1][name], abs=2 / 1752)  # rounding may swap two neighbours


def test_torchrun(tmp_path):
    launcher = (*TORCHRUN, "--nproc-per-node=2")
    rows = train_tiny(tmp_path, "torchrun", "max_steps=3", "data.val.shards=null", launcher=launcher)
    alone = train_tiny(tmp_path, "alone", "max_steps=3", "data.val.shards=null")
    assert [float(r["train/loss"]) for r in rows] == pytest.approx([float(r["train/loss"]) for r in alone], rel=1e-5)
    assert json.loads((tmp_path / "torchrun" / "summary.json").read_text())["world_size"] == 2
