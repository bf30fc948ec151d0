"""When a run saves, on several ranks that each write their part."""

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from clip_train.checkpoints import writer as writer_module
from clip_train.checkpoints.folder import read_manifest, write_pieces
from clip_train.checkpoints.retention import Retention
from clip_train.checkpoints.writer import CheckpointWriter
from clip_train.distributed import group_rank, group_size
from clip_train.training import checkpointing as checkpointing_module
from clip_train.training.checkpointing import Checkpointing
from tests.checkpoints.states import make_state
from tests.ranks import run_on_ranks


def make_checkpointing(folder: Path) -> Checkpointing:
    """That of a run in shards."""
    metrics: Any = SimpleNamespace(in_bad_row=lambda trainer: False, paused=lambda trainer: nullcontext())
    return Checkpointing(
        CheckpointWriter(folder, Retention(2), rank=group_rank(), ranks=group_size()),
        every_samples=None,
        every_minutes=None,
        milestone_samples=None,
        asynchronous=True,
        resumed_from=None,
        about=dict,
        metrics=metrics,
    )


def end(checkpointing: Checkpointing) -> None:
    """The end of a run of 64 samples."""
    connector = SimpleNamespace(dump_checkpoint=lambda weights_only: make_state(64))
    trainer: Any = SimpleNamespace(_checkpoint_connector=connector)
    clock = SimpleNamespace(batch_size=32, total_samples=64)
    module: Any = SimpleNamespace(samples_seen=64, clock=clock)
    checkpointing.on_train_end(trainer, module)


def end_with_a_failing_rank(folder: Path) -> int:
    """The second rank cannot write its part the first time; returns the attempts."""
    attempts = []

    def write_pieces_or_fail(folder, snapshot, rank, sharded):
        attempts.append(folder.name)
        if rank == 1 and len(attempts) == 1:
            raise OSError("no space")
        return write_pieces(folder, snapshot, rank, sharded)

    writer_module.write_pieces = write_pieces_or_fail
    end(make_checkpointing(folder))
    return len(attempts)


def test_the_last_save_is_tried_again_when_one_rank_could_not_write(tmp_path):
    assert run_on_ranks(end_with_a_failing_rank, 2, tmp_path) == [2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["samples_00000000000064.ckpt"]
    assert read_manifest(tmp_path / "samples_00000000000064.ckpt").samples_seen == 64


def end_with_a_slow_rank(folder: Path) -> bool:
    """The first rank goes on writing until the other has told its watchdog twice that it waits; whether it did."""
    told = folder / "told"
    heard = []

    def beat() -> None:
        if group_rank() == 1:
            with told.open("a") as file:
                file.write(".")

    def write_pieces_slowly(folder, snapshot, rank, sharded):
        end = time.monotonic() + 60
        while rank == 0 and time.monotonic() < end and not heard:
            heard.extend([True] * (told.exists() and told.stat().st_size >= 2))
            time.sleep(0.05)
        return write_pieces(folder, snapshot, rank, sharded)

    checkpointing_module.beat, writer_module.write_pieces = beat, write_pieces_slowly
    end(make_checkpointing(folder))
    return bool(heard)


def test_waiting_for_a_slow_rank_is_no_standstill(tmp_path):
    assert run_on_ranks(end_with_a_slow_rank, 2, tmp_path) == [True, False]


def end_twice(folder: Path) -> None:
    for _ in range(2):
        end(make_checkpointing(folder))


def test_a_run_that_stands_where_it_saved_last_writes_nothing(tmp_path):
    run_on_ranks(end_twice, 2, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["samples_00000000000064.ckpt"]
