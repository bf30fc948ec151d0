import json
from pathlib import Path

import pytest
import torch

from clip_train.checkpoints.folder import (
    InvalidCheckpointError,
    Manifest,
    list_checkpoints,
    read_checkpoint,
    read_manifest,
    verify,
    weight_shapes,
    whole_folder,
    write_manifest,
    write_pieces,
)
from clip_train.checkpoints.snapshot import SnapshotTaker
from tests.checkpoints.states import assert_equal, make_state


def save(path, state, about=None):
    snapshot = SnapshotTaker(copy=True).take(state, rank=0)
    with whole_folder(path) as temporary:
        files = write_pieces(temporary, snapshot, rank=0, sharded=False)
        write_manifest(temporary, Manifest(snapshot.samples_seen, files, about or {}))
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return save(tmp_path / "samples_00000000000064.ckpt", make_state(), {"run_name": "a"})


def test_a_state_comes_back_to_the_bit(checkpoint):
    assert_equal(read_checkpoint(checkpoint), make_state())
    manifest = verify(checkpoint)
    assert (manifest.samples_seen, manifest.about) == (64, {"run_name": "a"})
    assert set(manifest.files) == {"model.safetensors", "optimizer.safetensors", "state.pt"}
    assert weight_shapes(checkpoint) == {"0.weight": (12, 7), "0.bias": (12,), "2.weight": (5, 12)}


def test_a_snapshot_does_not_move_with_the_model():
    state, expected = make_state(), make_state()
    taker = SnapshotTaker(copy=True)
    snapshot = taker.take(state, rank=0)
    with torch.no_grad():
        for weight in state["state_dict"].values():
            weight.add_(1)
    for name, weight in expected["state_dict"].items():
        assert torch.equal(snapshot.model[name].local, weight)
    again = taker.take(state, rank=0)  # the same memory is used again
    assert again.model["0.bias"].local.data_ptr() == snapshot.model["0.bias"].local.data_ptr()
    assert torch.equal(again.model["0.bias"].local, expected["state_dict"]["0.bias"] + 1)


def test_a_loaded_optimizer_state_is_no_view_of_the_file(checkpoint):
    state = read_checkpoint(checkpoint)
    state["optimizer_states"][0]["state"][0]["exp_avg"].fill_(7)
    assert_equal(read_checkpoint(checkpoint), make_state())
    verify(checkpoint)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda path: (path / "state.pt").write_bytes(b"short"), "state.pt is 5 bytes, should be"),
        (lambda path: flip(path / "optimizer.safetensors"), "optimizer.safetensors has changed"),
        (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"format": 1'), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text('{"format": 99}'), "format 99, but this version reads 1"),
    ],
)
def test_damage_is_found_and_named(checkpoint, damage, reason):
    damage(checkpoint)
    with pytest.raises(InvalidCheckpointError, match=reason):
        verify(checkpoint)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def crash_while_saving(path):
    with whole_folder(path) as temporary:
        write_pieces(temporary, SnapshotTaker(copy=True).take(make_state(seed=1), rank=0), rank=0, sharded=False)
        raise KeyboardInterrupt


def test_a_crash_leaves_the_old_checkpoint_and_no_half_of_the_new(checkpoint):
    with pytest.raises(KeyboardInterrupt):
        crash_while_saving(checkpoint)
    assert_equal(read_checkpoint(checkpoint), make_state())
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_an_existing_checkpoint_is_replaced_whole(checkpoint):
    save(checkpoint, make_state(seed=1))
    assert_equal(read_checkpoint(checkpoint), make_state(seed=1))


def test_code_in_a_checkpoint_is_not_run(checkpoint):
    torch.save({"weight": Exception("any object that is not plain data")}, checkpoint / "state.pt")
    content = json.loads((checkpoint / "manifest.json").read_text())
    content["files"]["state.pt"]["bytes"] = (checkpoint / "state.pt").stat().st_size
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        read_checkpoint(checkpoint)


def test_only_checkpoints_are_listed(tmp_path):
    for name in ("samples_00000000000064.ckpt", "samples_00000000001024.ckpt", "samples_00000000002048.ckpt.tmp", "x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "samples_00000000000064.ckpt",
        "samples_00000000001024.ckpt",
    ]
    with pytest.raises(InvalidCheckpointError, match="no folder"):
        read_manifest(Path(__file__))
