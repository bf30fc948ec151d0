"""When a run saves, on several ranks that each write their part."""

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clip_train.checkpoints import mirror as mirror_module
from clip_train.checkpoints import writer as writer_module
from clip_train.checkpoints.folder import checkpoint_name, read_manifest, verify, write_pieces
from clip_train.checkpoints.mirror import Mirror
from clip_train.checkpoints.retention import Retention
from clip_train.checkpoints.writer import CheckpointWriter
from clip_train.distributed import group_rank, group_size
from clip_train.training.callbacks import checkpointing as checkpointing_module
from clip_train.training.callbacks.checkpointing import Checkpointing
from tests.checkpoints.states import make_state
from tests.checkpoints.test_folder import save
from tests.ranks import run_on_ranks


def make_checkpointing(folder: Path, mirror: Mirror | None = None, resumed_from: Path | None = None) -> Checkpointing:
    """That of a run in shards, if there are several ranks."""
    metrics: Any = SimpleNamespace(in_bad_row=lambda trainer: False, paused=lambda trainer: nullcontext())
    return Checkpointing(
        CheckpointWriter(folder, Retention(2), rank=group_rank(), ranks=group_size(), mirror=mirror),
        every_samples=None,
        every_minutes=None,
        milestone_samples=None,
        asynchronous=True,
        resumed_from=resumed_from,
        about=dict,
        metrics=metrics,
    )


def module_at(samples_seen: int) -> Any:
    """What a run of 64 samples trains."""
    return SimpleNamespace(samples_seen=samples_seen, clock=SimpleNamespace(batch_size=32, total_samples=64))


def end(checkpointing: Checkpointing, samples_seen: int = 64) -> None:
    connector = SimpleNamespace(dump_checkpoint=lambda weights_only: make_state(samples_seen))
    trainer: Any = SimpleNamespace(_checkpoint_connector=connector)
    checkpointing.on_train_end(trainer, module_at(samples_seen))


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


@pytest.fixture
def slow_mirror(tmp_path, monkeypatch) -> Mirror:
    """It takes the last file only after what a stopped run waits for."""
    mirror = Mirror(f"{tmp_path}/mirror", tmp_path / "run")
    put_file = mirror.files.put_file

    def put_file_slowly(here, there, **settings):
        if here.endswith("manifest.json"):
            time.sleep(1)
        put_file(here, there, **settings)

    monkeypatch.setattr(mirror.files, "put_file", put_file_slowly)
    monkeypatch.setattr(checkpointing_module, "_LEAVING_SECONDS", 0.0)
    return mirror


def leave(folder: Path, mirror: Mirror, samples_seen: int) -> Path:
    """A run saves for the last time and ends; the copy."""
    checkpointing = make_checkpointing(folder / "run", mirror)
    end(checkpointing, samples_seen)
    trainer: Any = SimpleNamespace()
    checkpointing.teardown(trainer, module_at(samples_seen), "fit")
    return folder / "mirror" / checkpoint_name(samples_seen)


def test_a_complete_run_waits_for_its_copy(tmp_path, slow_mirror):
    verify(leave(tmp_path, slow_mirror, 64))


def test_what_is_stopped_does_not_wait(tmp_path, slow_mirror):
    assert not (leave(tmp_path, slow_mirror, 32) / "manifest.json").exists()


def test_a_signal_ends_the_wait(tmp_path, slow_mirror, monkeypatch):
    monkeypatch.setattr(checkpointing_module, "stop_requested", lambda: 15)
    assert not (leave(tmp_path, slow_mirror, 64) / "manifest.json").exists()


def test_a_store_that_takes_nothing_ends_the_wait(tmp_path, slow_mirror, monkeypatch):
    monkeypatch.setattr(mirror_module, "_STALLED_SECONDS", 0.0)
    assert not (leave(tmp_path, slow_mirror, 64) / "manifest.json").exists()


def test_the_checkpoint_that_a_run_goes_on_from_is_copied_if_it_was_not(tmp_path):
    mirror = Mirror(f"{tmp_path}/mirror", tmp_path / "run")
    own = save(tmp_path / "run" / checkpoint_name(32), make_state(32))
    trainer: Any = SimpleNamespace(is_global_zero=True)
    make_checkpointing(tmp_path / "run", mirror, own).on_train_start(trainer, module_at(32))
    mirror.wait(60)
    verify(tmp_path / "mirror" / own.name)
    other = save(tmp_path / "other" / checkpoint_name(48), make_state(48))
    make_checkpointing(tmp_path / "run", mirror, other).on_train_start(trainer, module_at(48))
    mirror.wait(60)
    assert [path.name for path in (tmp_path / "mirror").iterdir()] == [own.name]  # another run's is not
