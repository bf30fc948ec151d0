"""A rank that hangs or is stopped ends the run, and the stacks say where."""

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest

from clip_train.heartbeat import beat, last_beat
from clip_train.training.callbacks.watchdog import EXIT_STALLED, group_timeout
from tests.cli.runs import TINY, group_is_gone, start_clip_train
from tests.cli.warm_start import WarmProcess

COMMON = [*TINY, "data.val.shards=null", "data.num_workers=1", "max_steps=100000", "guard.first_step_timeout=300"]


def start(*arguments: str) -> WarmProcess:
    """`clip-train` with two ranks and workers, in a process group of its own."""
    return start_clip_train(*COMMON, "trainer.devices=2", *arguments)


def the_other_rank(process: WarmProcess) -> int:
    """The process that the first rank has started as the second."""
    for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            if b"train_ddp_process_1" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
    raise AssertionError("there is no other rank")


def test_a_stopped_rank_ends_the_run_and_leaves_nothing(tmp_path):
    process = start("guard.timeout=10", "trainer.log_every=1", f"output_dir={tmp_path}", "run_name=run")
    end = time.monotonic() + 300
    while not (tmp_path / "run" / "metrics.csv").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)
    time.sleep(2)
    os.kill(the_other_rank(process), signal.SIGSTOP)
    output = "".join(process.communicate(timeout=300))
    assert process.returncode == EXIT_STALLED, output
    assert "clip-train: error: rank 0 has finished nothing for" in output
    assert group_is_gone(process.pid)
    # Wherever it waits for the other: in the loss, in backward, in an agreement.
    assert "in _fit" in (tmp_path / "run" / "stacks" / "rank_00000.txt").read_text()


def test_a_rank_that_hangs_is_named_by_its_stack(tmp_path):
    hangs = ("loss._target_=tests.training.odd_losses.nan_at_calls", "+loss.calls=[]", "+loss.stuck_at=3")
    process = start("guard.timeout=10", *hangs, "+loss.rank=1", f"output_dir={tmp_path}", "run_name=run")
    output = "".join(process.communicate(timeout=400))
    assert process.returncode == EXIT_STALLED, output
    assert group_is_gone(process.pid)
    stacks = [(tmp_path / "run" / "stacks" / f"rank_{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert "in nan_at_calls" in stacks[1]
    assert "in nan_at_calls" not in stacks[0]
    assert "in training_step" in stacks[0]


def test_loader_workers_beat_for_their_rank():
    before = last_beat()
    worker = multiprocessing.get_context("fork").Process(target=beat)
    worker.start()
    worker.join()
    assert last_beat() > before


@pytest.mark.parametrize(("timeout", "first"), [(900, 3600), (7200, 60), (None, 60)])
def test_collectives_expire_after_the_watchdog(timeout, first):
    assert group_timeout(timeout, first) > timedelta(seconds=max(timeout or 0, first))
