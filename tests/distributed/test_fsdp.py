"""A run with its state in shards learns what one process learns, and goes on from where any other run came to."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clip_train.checkpoints.folder import list_checkpoints, read_weights, verify
from clip_train.interop.single_file import export_single_file
from clip_train.training.loggers.csv_logger import read_metrics
from tests.distributed.train_many import train_on

BATCH, STEPS, HALF = 48, 6, 3
# 194 pairs on 3 ranks: the last has a batch less to encode than the others.
RUN = (
    f"batch_size={BATCH} max_steps={STEPS} checkpoint.every={HALF} checkpoint.keep=2 model.grad_checkpointing=true"
    " data.val.shards=demo:emoji/val_concept/*.tar eval.batch_size=64 eval.every=3 eval.picture=false"
)
FSDP = f"{RUN} trainer.strategy=fsdp"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run folders: of one process, of shards on three ranks, and of either gone on with by the other."""
    folder = tmp_path_factory.mktemp("runs")
    half = f"checkpoints/samples_{HALF * BATCH:014d}.ckpt"
    train_on(1, folder, f"one {RUN}")
    train_on(
        3,
        folder,
        f"sharded {FSDP}",
        f"cached {FSDP} micro_batch_size=4 loss.exchange=ring model.grad_checkpointing=selective",
        f"resumed {FSDP} resume={folder}/sharded/{half}",
        f"one_then_sharded {FSDP} resume={folder}/one/{half}",
    )
    train_on(1, folder, f"sharded_then_one {RUN} resume={folder}/sharded/{half}")
    return folder


def metric(run: Path, name: str, where: str = "") -> list[float]:
    """A column of metrics.csv, in the rows that have a value in it, or in `where`."""
    return [float(row[name]) for row in read_metrics(run / "metrics.csv")[1] if row[where or name]]


@pytest.mark.parametrize("name", ["sharded", "cached", "one_then_sharded", "sharded_then_one"])
def test_it_learns_what_one_process_learns(runs, name):
    samples = metric(runs / name, "samples_seen", where="train/loss")
    assert samples == [BATCH * step for step in range(HALF + 1 if "then" in name else 1, STEPS + 1)]
    for column, accuracy in (("train/loss", 1e-5), ("train/grad_norm", 1e-4)):
        assert metric(runs / name, column) == pytest.approx(metric(runs / "one", column)[-len(samples) :], rel=accuracy)
    found, expected = (read_weights(list_checkpoints(runs / run / "checkpoints")[-1]) for run in (name, "one"))
    for parameter, value in expected.items():
        assert (found[parameter] - value).norm() <= 1e-5 * (value.norm() + 1), parameter


def test_its_evaluation_is_that_of_one_process(runs):
    column = "val/val_concept/image_to_text_recall@10"
    expected = metric(runs / "one", column)
    assert len(expected) == 2
    assert metric(runs / "sharded", column) == pytest.approx(expected, abs=2 / 194)  # rounding may swap neighbours


def test_resumed_it_ends_with_the_same_bytes(runs):
    ends = [verify(list_checkpoints(runs / run / "checkpoints")[-1]) for run in ("sharded", "resumed")]
    tensors = [{name: file for name, file in end.files.items() if name.endswith(".safetensors")} for end in ends]
    assert tensors[0] == tensors[1]
    assert sorted(tensors[0]) == [
        f"{part}.{rank:05d}.safetensors" for part in ("model", "optimizer") for rank in range(3)
    ]


def test_export_makes_one_file_of_it(runs, tmp_path):
    checkpoint = list_checkpoints(runs / "sharded" / "checkpoints")[-1]
    export_single_file(checkpoint, tmp_path / "all.safetensors")
    found = load_file(tmp_path / "all.safetensors")
    assert all(torch.equal(found[name.removeprefix("model.")], w) for name, w in read_weights(checkpoint).items())
