"""Other optimizers, schedules and the average of the weights, as a user meets them."""

import json
from pathlib import Path

import pytest
import torch

from clip_train.checkpoints.folder import list_checkpoints, read_checkpoint, read_ema_weights, read_weights, verify
from clip_train.training.loggers.csv_logger import read_metrics
from tests.cli.runs import TINY, clip_train

COMMON = [*TINY, "data.num_workers=0", "trainer.log_every=1", "optim.warmup=0", "checkpoint.every=2"]
RUN = [*COMMON, "optim=lamb", "ema.decay=0.9", "schedule=constant", "schedule.cooldown=2", "checkpoint.keep=9"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run of four steps, with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("whole")
    done = clip_train(*RUN, "max_steps=4", f"output_dir={folder}", "run_name=run", "eval.picture=false")
    assert done.returncode == 0, done.stderr
    assert "lamb, rate 0.001, 0 samples of warm-up, then constant" in done.stdout
    return folder / "run"


def rows(run: Path) -> list[dict[str, str]]:
    return [row for row in read_metrics(run / "metrics.csv")[1] if row["train/loss"]]


def test_resumed_it_ends_with_the_same_bytes(tmp_path, whole):
    half = list_checkpoints(whole / "checkpoints")[0]
    arguments = [*RUN, "max_steps=4", "data.val.shards=null", f"output_dir={tmp_path}", "run_name=run"]
    done = clip_train(*arguments, f"resume={half}")
    assert done.returncode == 0, done.stderr
    ends = [verify(list_checkpoints(run / "checkpoints")[-1]).files for run in (whole, tmp_path / "run")]
    for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
        assert ends[0][name] == ends[1][name], name
    assert [row["train/lr"] for row in rows(whole)] == ["0.001", "0.001", "0.001", "0.0005"]


def test_the_average_is_evaluated(tmp_path, whole):
    """A run that starts at the averaged weights and stays there finds the same."""
    from safetensors.torch import save_file

    end = list_checkpoints(whole / "checkpoints")[-1]
    averages, weights = read_ema_weights(end), read_weights(end)
    assert not torch.equal(averages["model.logit_scale"], weights["model.logit_scale"])
    save_file({name.removeprefix("model."): w for name, w in averages.items()}, tmp_path / "ema.safetensors")
    still = ["max_steps=1", "optim.lr=0", f"init_from={tmp_path}/ema.safetensors", "eval.picture=false"]
    done = clip_train(*COMMON, *still, f"output_dir={tmp_path}", "run_name=still")
    assert done.returncode == 0, done.stderr
    found, expected = (
        json.loads((run / "summary.json").read_text())["metrics"]["val/unseen_style/loss"]
        for run in (tmp_path / "still", whole)
    )
    assert found == pytest.approx(expected, rel=1e-6)
    assert read_checkpoint(end)["ema"].keys() == weights.keys()


def test_on_with_another_schedule_but_not_with_another_optimizer(tmp_path, whole):
    half = list_checkpoints(whole / "checkpoints")[0]
    common = [*RUN, "data.val.shards=null", f"output_dir={tmp_path}", "max_steps=4", f"resume={half}"]
    refused = clip_train(*common, "optim=lion", "run_name=refused")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "has the optimizer state of optim=lamb" in refused.stderr and f"init_from={half}" in refused.stderr
    others = [argument for argument in common if not argument.startswith(("schedule", "ema"))]
    done = clip_train(*others, "schedule=linear", "optim.text.layer_decay=0.5", "run_name=other")
    assert done.returncode == 0, done.stderr
    assert "schedule.name=linear (was constant)" in done.stdout
    assert "optim.text.layer_decay=0.5 (was None)" in done.stdout
    assert [row["train/lr"] for row in rows(tmp_path / "other")] == ["0.0005", "0.00025"]
    assert "ema.safetensors" not in verify(list_checkpoints(tmp_path / "other" / "checkpoints")[-1]).files
