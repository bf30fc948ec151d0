import logging

import fsspec
import pytest

from clip_train.checkpoints import writer as writer_module
from clip_train.checkpoints.folder import list_checkpoints, read_checkpoint, read_manifest, samples_of, write_pieces
from clip_train.checkpoints.mirror import Mirror
from clip_train.checkpoints.retention import Retention, Saved
from clip_train.checkpoints.snapshot import SnapshotTaker
from clip_train.checkpoints.writer import CheckpointWriter
from clip_train.errors import ConfigError
from tests.checkpoints.states import assert_equal, make_state


def write(writer, *samples, **about):
    for samples_seen in samples:
        writer.write(SnapshotTaker(copy=True).take(make_state(samples_seen), rank=0), about)
        writer.wait()


def saved(folder):
    return [samples_of(path) for path in list_checkpoints(folder)]


def test_the_newest_stay_and_the_best(tmp_path):
    writer = CheckpointWriter(tmp_path, Retention(2, metric="recall"))
    write(writer, 32, 64)
    writer.add_metrics(64, {"recall": 0.5})
    write(writer, 96, 128, 160)
    assert saved(tmp_path) == [64, 128, 160]
    assert_equal(read_checkpoint(tmp_path / "samples_00000000000128.ckpt"), make_state(128))
    write(writer, 192, metrics={"recall": 0.6})
    assert saved(tmp_path) == [160, 192]


def test_what_lies_ahead_of_a_resumed_run_goes(tmp_path):
    writer = CheckpointWriter(tmp_path, Retention(9))
    write(writer, 32, 64, 96, 128)
    (tmp_path / "samples_00000000000160.ckpt.tmp").mkdir()
    writer.remove_from(64, tmp_path / "samples_00000000000064.ckpt")
    assert saved(tmp_path) == [32, 64]
    assert not list(tmp_path.glob("*.tmp"))
    writer.remove_from(64, None)  # a checkpoint of elsewhere
    assert saved(tmp_path) == [32]


def test_a_failed_save_leaves_the_last_one_and_is_tried_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(writer_module, "_FIRST_RETRY_SECONDS", 0.0)
    writer = CheckpointWriter(tmp_path, Retention(1))
    write(writer, 32)
    obstacle = tmp_path / "samples_00000000000064.ckpt.2.tmp"
    obstacle.write_text("a file where a folder should be")
    with caplog.at_level(logging.ERROR):
        write(writer, 64)
    assert "COULD NOT SAVE A CHECKPOINT at 64 samples" in caplog.text
    assert writer.failure and not writer.busy
    assert saved(tmp_path) == [32]
    obstacle.unlink()
    writer._retry_at = 0.0
    assert writer.retry_due
    write(writer, 96)
    assert not writer.failure and not writer.retry_due
    assert saved(tmp_path) == [96]


def test_an_invalid_one_does_not_count_among_those_kept(tmp_path):
    writer = CheckpointWriter(tmp_path, Retention(2))
    write(writer, 32, 64)
    (tmp_path / "samples_00000000000064.ckpt" / "model.safetensors").write_bytes(b"")
    write(writer, 96)
    assert saved(tmp_path) == [32, 96]


def test_the_mirror_has_what_the_folder_has(tmp_path):
    writer = CheckpointWriter(tmp_path / "here", Retention(2), mirror=Mirror("memory://mirror/b32", tmp_path / "here"))
    write(writer, 32, 64, 96)
    assert writer.mirror
    writer.mirror.wait(30)
    copies = fsspec.filesystem("memory")
    assert sorted(path.rpartition("/")[2] for path in copies.ls("/mirror/b32", detail=False)) == [
        "samples_00000000000064.ckpt",
        "samples_00000000000096.ckpt",
    ]
    copies.get("/mirror/b32/samples_00000000000096.ckpt", str(tmp_path / "back"), recursive=True)
    assert_equal(read_checkpoint(tmp_path / "back"), make_state(96))


def test_a_mirror_that_fails_is_said_and_costs_nothing(tmp_path, caplog, monkeypatch):
    mirror = Mirror("memory://mirror/broken", tmp_path)
    monkeypatch.setattr(
        mirror.files, "put_file", lambda *paths, **_: (_ for _ in ()).throw(OSError("no route to host"))
    )
    writer = CheckpointWriter(tmp_path, Retention(1), mirror=mirror)
    with caplog.at_level(logging.ERROR):
        write(writer, 32, 64)
        mirror.wait(30)
    assert "64.ckpt could not be copied (OSError: no route to host)" in caplog.text
    assert saved(tmp_path) == [64] and not writer.failure


def test_an_address_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror=nowhere://x"):
        Mirror("nowhere://x", tmp_path)
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror=.* is where the checkpoints are"):
        Mirror(f"{tmp_path}/a/..", tmp_path)


def test_metrics_are_noted_in_a_checkpoint_that_is_there(tmp_path):
    writer = CheckpointWriter(tmp_path, Retention(1))
    write(writer, 32, metrics={"a": 1.0})
    writer.add_metrics(32, {"b": 2.0})
    writer.wait()
    assert read_manifest(tmp_path / "samples_00000000000032.ckpt").about["metrics"] == {"a": 1.0, "b": 2.0}
    assert writer.saved() == {32: Saved({"a": 1.0, "b": 2.0})}


def test_milestones_stay_for_good(tmp_path):
    writer = CheckpointWriter(tmp_path, Retention(1))
    write(writer, 32, milestone=True)
    write(writer, 64, 96)
    assert saved(tmp_path) == [32, 96]


def test_noting_metrics_does_not_make_a_failure_good(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_FIRST_RETRY_SECONDS", 0.0)
    writer = CheckpointWriter(tmp_path, Retention(1))
    (tmp_path / "samples_00000000000064.ckpt.1.tmp").write_text("a file where a folder should be")
    write(writer, 64)
    writer.add_metrics(64, {"recall": 0.5})
    writer.wait()
    assert writer.failure and writer.retry_due


def test_the_same_moment_of_another_history_is_written_anew(tmp_path):
    writer = CheckpointWriter(tmp_path, Retention(1))
    write(writer, 64)
    state = make_state(64)
    state["skipped_samples"] = 320
    writer.write(SnapshotTaker(copy=True).take(state, rank=0), {})
    writer.wait()
    assert read_checkpoint(tmp_path / "samples_00000000000064.ckpt")["skipped_samples"] == 320
    assert [path.name for path in tmp_path.iterdir()] == ["samples_00000000000064.ckpt"]


def test_a_broken_checkpoint_ahead_is_set_aside(tmp_path):
    writer = CheckpointWriter(tmp_path, Retention(9))
    write(writer, 32, 64, 96)
    (tmp_path / "samples_00000000000096.ckpt" / "model.safetensors").write_bytes(b"")
    writer.remove_from(32, tmp_path / "samples_00000000000032.ckpt")
    assert saved(tmp_path) == [32]
    assert (tmp_path / "samples_00000000000096.ckpt.invalid" / "manifest.json").exists()


def write_on_ranks(writers, monkeypatch, failing):
    """One attempt, of one rank after the other in this order, those of `failing` in vain."""

    def write_pieces_or_fail(folder, snapshot, rank, sharded):
        if rank in failing:
            raise OSError(f"no space for rank {rank}")
        return write_pieces(folder, snapshot, rank, sharded)

    monkeypatch.setattr(writer_module, "write_pieces", write_pieces_or_fail)
    for writer in writers:
        writer.write(SnapshotTaker(copy=True).take(make_state(64), writer.rank), {})
        if writer.rank or 0 in failing:
            writer.wait(60)
    for writer in writers:
        writer.wait(60)


def test_the_first_rank_does_not_wait_for_one_that_has_failed(tmp_path, monkeypatch):
    writers = [CheckpointWriter(tmp_path, Retention(1), rank=rank, ranks=3) for rank in range(3)]
    write_on_ranks(writers[::-1], monkeypatch, failing={2})  # it fails before the folder is there
    assert "rank 2 could not write its part: logs/rank_00002.log says why" in writers[0].failure
    assert not writers[1].failure and "no space for rank 2" in writers[2].failure
    write_on_ranks(writers, monkeypatch, failing={})
    assert not any(writer.failure for writer in writers)
    assert [path.name for path in tmp_path.iterdir()] == ["samples_00000000000064.ckpt"]
    assert sorted(path.name for path in tmp_path.glob("*/*")) == [
        "manifest.json",
        "model.00000.safetensors",
        "optimizer.00000.safetensors",
        "state.pt",
    ]


def test_a_late_part_of_a_failed_attempt_is_not_taken_for_one_of_the_next(tmp_path, monkeypatch):
    writers = [CheckpointWriter(tmp_path, Retention(1), rank=rank, ranks=2) for rank in range(2)]
    write_on_ranks(writers, monkeypatch, failing={0})  # the other writes when that has given up
    assert not writers[1].failure and len(list(tmp_path.glob("*.tmp"))) == 1
    write_on_ranks(writers, monkeypatch, failing={1})
    assert "rank 1 could not write its part" in writers[0].failure
    assert not saved(tmp_path)
    write_on_ranks(writers, monkeypatch, failing={})
    assert [path.name for path in tmp_path.iterdir()] == ["samples_00000000000064.ckpt"]
