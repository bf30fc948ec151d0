"""The number of processes decides how fast a run goes, not what it learns."""

import json
import sys

import pytest

from tests.cli.runs import train_tiny

STEPS = 10


def test_losses_do_not_depend_on_the_number_of_ranks(tmp_path):
    runs = {
        world_size: train_tiny(tmp_path, str(world_size), f"max_steps={STEPS}", f"trainer.devices={world_size}")
        for world_size in (1, 2, 4)
    }
    losses = {world_size: [float(row["train/loss"]) for row in rows] for world_size, rows in runs.items()}
    assert len(losses[1]) == STEPS
    assert losses[1][-1] < losses[1][0]
    for world_size in (2, 4):
        assert losses[world_size] == pytest.approx(losses[1], rel=1e-5)
        summary = json.loads((tmp_path / str(world_size) / "summary.json").read_text())
        assert (summary["world_size"], summary["samples_seen"]) == (world_size, 32 * STEPS)
    recalls = [json.loads((tmp_path / name / "summary.json").read_text())["metrics"] for name in "124"]
    for metrics in recalls[1:]:
        name = "val/unseen_style/image_to_text_recall@10"
        assert metrics[name] == pytest.approx(recalls[0][name], abs=2 / 1752)  # rounding may swap two neighbours


def test_torchrun(tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    rows = train_tiny(tmp_path, "torchrun", "max_steps=3", "data.val.shards=null", launcher=torchrun)
    alone = train_tiny(tmp_path, "alone", "max_steps=3", "data.val.shards=null")
    assert [float(r["train/loss"]) for r in rows] == pytest.approx([float(r["train/loss"]) for r in alone], rel=1e-5)
    assert json.loads((tmp_path / "torchrun" / "summary.json").read_text())["world_size"] == 2
