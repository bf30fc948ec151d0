"""Steps that go wrong in real runs: skipped on all ranks, gone back from, given up."""

import json
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch

from clip_train.checkpoints.folder import checkpoint_name, read_checkpoint, read_weights
from clip_train.training.callbacks.sample_log import read_sample_log
from clip_train.training.loggers.csv_logger import read_metrics
from tests.cli.runs import TINY, clip_train, group_is_gone, start_clip_train
from tests.cli.warm_start import WarmProcess

B = 32
COMMON = [*TINY, "data.val.shards=null", "data.num_workers=1", "trainer.log_every=1", "data.sample_log=true"]


def losing(name: str, calls: list[int]) -> list[str]:
    """A loss that goes wrong at these calls."""
    return [f"loss._target_=tests.training.odd_losses.{name}", f"+loss.calls={calls}".replace(" ", "")]


@pytest.mark.parametrize(
    "odd",
    [
        [*losing("nan_at_calls", [3]), "micro_batch_size=8"],
        [*losing("nan_at_calls", [3]), "trainer.precision=16-mixed"],
        [*losing("nan_at_calls", [3]), "+loss.rank=1", "micro_batch_size=8"],
        [*losing("nan_gradient_at_calls", [3]), "+loss.rank=1"],
    ],
)
def test_a_bad_step_changes_nothing_to_the_bit(tmp_path, odd):
    ranks = 2 if "+loss.rank=1" in odd else 1
    run = (*COMMON, *odd, "max_steps=3", "checkpoint.every=2", f"output_dir={tmp_path}", "run_name=run")
    done = clip_train(*run, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 3 is skipped" in done.stdout
    _, rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row["train/skipped_steps"] for row in rows] == ["0.0", "0.0", "1.0"]
    assert [row["samples_seen"] for row in rows] == ["32", "64", "96"]
    before, after = (read_checkpoint(tmp_path / "run" / "checkpoints" / checkpoint_name(k * B)) for k in (2, 3))
    assert_same(after["state_dict"], before["state_dict"])
    for old, new in zip(before["optimizer_states"], after["optimizer_states"], strict=True):
        for parameter, state in old["state"].items():
            assert_same(new["state"][parameter], state)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, list[str]]:
    """The samples of each step of a run in which nothing goes wrong."""
    folder = tmp_path_factory.mktemp("runs")
    done = clip_train(*COMMON, "max_steps=20", f"output_dir={folder}", "run_name=undisturbed")
    assert done.returncode == 0, done.stderr
    return read_sample_log(folder / "undisturbed" / "samples")


# Steps 6 to 8 of 12 are bad: back to the checkpoint at 4, which goes on with the samples of step 9.
ROLLING_BACK = ["max_steps=12", "checkpoint.every=4", "guard.max_bad_steps=3"]


def test_goes_back_and_leaves_the_data_out_then_goes_on_as_if_never_killed(tmp_path, undisturbed):
    arguments = [*COMMON, *ROLLING_BACK, f"output_dir={tmp_path}"]
    done = clip_train(*arguments, *losing("nan_at_calls", [6, 7, 8]), "+loss.rank=1", "run_name=whole", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 steps in a row, up to step 8, had no finite loss or gradient: going back to samples_" in done.stdout
    whole = tmp_path / "whole"
    assert json.loads((whole / "summary.json").read_text())["rollbacks"] == 1
    _, rows = read_metrics(whole / "metrics.csv")
    assert [int(row["samples_seen"]) for row in rows] == [B * step for step in range(1, 13)]
    assert {row["train/skipped_steps"] for row in rows} == {"0.0"}
    assert read_sample_log(whole / "samples") == {
        B * step: undisturbed[B * (step if step <= 4 else step + 4)] for step in range(1, 13)
    }

    # Calls 9 to 16 are the steps 5 to 12: stuck in step 6, before another checkpoint, or in step 10, after that at 8.
    for stuck_at, last_written in ((10, "rollback.json"), (14, f"checkpoints/{checkpoint_name(8 * B)}")):
        cut = tmp_path / f"cut_{stuck_at}"
        stuck = [*losing("nan_at_calls", [6, 7, 8]), f"+loss.stuck_at={stuck_at}", f"run_name={cut.name}"]
        process = start_clip_train(*arguments, "trainer.devices=2", *stuck)
        wait_for((cut / last_written).exists, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        again = (*arguments, *losing("nan_at_calls", []), f"run_name={cut.name}", "resume=auto")
        resumed = clip_train(*again, ranks=2)
        assert resumed.returncode == 0, resumed.stderr
        assert "resuming from" in resumed.stdout
        assert read_sample_log(cut / "samples") == read_sample_log(whole / "samples")
        last = checkpoint_name(12 * B)
        assert_same(read_weights(cut / "checkpoints" / last), read_weights(whole / "checkpoints" / last))


def wait_for(done: Callable[[], bool], process: WarmProcess) -> None:
    end = time.monotonic() + 600
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


def test_what_stays_bad_ends_with_a_report_on_all_ranks(tmp_path, undisturbed):
    always = losing("nan_gradient_at_calls", list(range(3, 40)))
    run = (*COMMON, *always, "max_steps=12", "guard.max_bad_steps=3", f"output_dir={tmp_path}", "run_name=run")
    process = start_clip_train(*run, "trainer.devices=2")
    output = "".join(process.communicate(timeout=300))
    assert process.returncode == 70, output
    assert group_is_gone(process.pid)
    assert "going back to the start of the run, as there is no checkpoint" in output
    assert output.count("clip-train: error: training has diverged after 0 samples: 3 steps in a row, up to step 3") == 1
    report = json.loads((tmp_path / "run" / "guard_report.json").read_text())
    # The first round left out the steps 1 to 5; the second began with the samples of step 6.
    assert [step["samples_seen"] for step in report["bad_steps"]] == [B, 2 * B, 3 * B]
    assert [step["position"] for step in report["bad_steps"]] == [5 * B, 6 * B, 7 * B]
    shards = [len(keys) for step in report["bad_steps"] for keys in step["samples"].values()]
    assert sum(shards) == 3 * B
    assert {shard for step in report["bad_steps"] for shard in step["samples"]} == {
        name.partition("[")[0] for step in (6, 7, 8) for name in undisturbed[step * B]
    }
    assert [step["train/grad_norm"] for step in report["last_steps"]] == ["nan"] * 3
    assert all(step["train/loss"] > 0 for step in report["last_steps"])
    assert report["config"]["guard"]["max_bad_steps"] == 3
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
