"""A copy that has a manifest is whole, whatever failed on the way, and in whichever process."""

from pathlib import Path

import pytest

from clip_train.checkpoints.folder import verify
from clip_train.checkpoints.mirror import Mirror
from tests.checkpoints.states import make_state
from tests.checkpoints.test_folder import save

NAME = "samples_00000000000064.ckpt"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save(tmp_path / "here" / NAME, make_state())


@pytest.fixture
def copy(tmp_path) -> Path:
    return tmp_path / "there" / NAME


@pytest.fixture
def mirror(checkpoint, copy) -> Mirror:
    return Mirror(str(copy.parent), checkpoint.parent)


def fail_at(mirror, monkeypatch, name) -> None:
    """This file cannot be copied."""
    put_file = mirror.files.put_file

    def put_file_or_fail(here, there, **settings):
        if here.endswith(name):
            raise OSError("no route to host")
        put_file(here, there, **settings)

    monkeypatch.setattr(mirror.files, "put_file", put_file_or_fail)


def test_a_manifest_does_not_go_to_a_copy_that_is_not_whole(mirror, checkpoint, copy, monkeypatch):
    with monkeypatch.context() as patched:
        fail_at(mirror, patched, "optimizer.safetensors")
        mirror.upload(checkpoint)
        mirror.upload_manifest(checkpoint)  # an evaluation has ended
        mirror.wait(60)
    assert not (copy / "manifest.json").exists()
    mirror.upload_manifest(checkpoint)
    mirror.wait(60)
    verify(copy)


def test_of_a_whole_copy_only_the_manifest_is_copied_again(mirror, checkpoint, copy):
    mirror.upload(checkpoint)
    mirror.wait(60)
    before = (copy / "model.safetensors").stat().st_mtime_ns
    (checkpoint / "manifest.json").write_text("with metrics")
    mirror.upload_manifest(checkpoint)
    mirror.wait(60)
    assert (copy / "manifest.json").read_text() == "with metrics"
    assert (copy / "model.safetensors").stat().st_mtime_ns == before


def test_a_copy_of_another_history_is_replaced(mirror, checkpoint, copy, monkeypatch):
    mirror.upload(checkpoint)
    mirror.wait(60)
    (copy / "model.00001.safetensors").write_bytes(b"of a run on more ranks")
    save(checkpoint, make_state(seed=1))
    with monkeypatch.context() as patched:
        fail_at(mirror, patched, "optimizer.safetensors")
        mirror.upload(checkpoint)
        mirror.wait(60)
    assert not (copy / "manifest.json").exists()
    mirror.upload(checkpoint)
    mirror.wait(60)
    assert verify(copy) == verify(checkpoint)
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in checkpoint.iterdir())


def test_another_process_copies_what_is_missing_only(mirror, checkpoint, copy):
    mirror.upload_missing(checkpoint)
    mirror.wait(60)
    verify(copy)
    before = (copy / "manifest.json").stat().st_mtime_ns
    again = Mirror(str(copy.parent), checkpoint.parent)
    again.upload_missing(checkpoint)
    again.wait(60)
    assert (copy / "manifest.json").stat().st_mtime_ns == before
