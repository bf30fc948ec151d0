import logging

import pytest

from clip_train.checkpoints.choice import changed_settings, check_data, check_model, newest_valid
from clip_train.errors import ConfigError
from tests.checkpoints.states import make_state
from tests.checkpoints.test_folder import flip, save


@pytest.fixture
def folder(tmp_path):
    for samples_seen in (32, 64, 96):
        save(tmp_path / f"samples_{samples_seen:014d}.ckpt", make_state(samples_seen))
    return tmp_path


def test_the_newest_valid_one_is_taken_and_the_others_are_named(folder, caplog):
    found = newest_valid(folder)
    assert found and found[1].samples_seen == 96
    flip(folder / "samples_00000000000096.ckpt" / "model.safetensors")
    (folder / "samples_00000000000064.ckpt" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = newest_valid(folder)
    assert found and found[1].samples_seen == 32
    assert "96.ckpt: model.safetensors has changed" in caplog.messages[0]
    assert "64.ckpt: it has no manifest.json" in caplog.messages[1]


def test_no_checkpoint_and_no_valid_one(folder, tmp_path):
    assert newest_valid(tmp_path / "none") is None
    for path in folder.glob("*.ckpt"):
        flip(path / "state.pt")
    with pytest.raises(ConfigError, match=r"none of the 3 checkpoints in .* is valid"):
        newest_valid(folder)


def test_another_model_is_refused_with_what_differs(folder):
    path = folder / "samples_00000000000064.ckpt"
    shapes = {"0.weight": (12, 7), "0.bias": (12,), "2.weight": (5, 12)}
    check_model(path, shapes)
    with pytest.raises(ConfigError, match=r"1 missing: 3.bias; 1 unexpected: 0.bias; .*2.weight is \[5, 12\], not \[6"):
        check_model(path, {"0.weight": (12, 7), "3.bias": (2,), "2.weight": (6, 12)})


def test_other_data_is_refused_unless_allowed(folder, caplog):
    check_data(folder, [], allowed=False)
    with pytest.raises(ConfigError, match=r"3 shards, was 4.*resume.allow=\[data\]"):
        check_data(folder, ["3 shards, was 4"], allowed=False)
    with caplog.at_level(logging.WARNING):
        check_data(folder, ["3 shards, was 4"], allowed=True)
    assert "3 shards, was 4" in caplog.text


def test_changed_settings():
    old = {"batch_size": 64, "optim": {"lr": 1e-3, "eps": 1e-6}, "gone": 1}
    new = {"batch_size": 32, "optim": {"lr": 5e-4, "eps": 1e-6}}
    assert changed_settings(old, new) == ["batch_size=32 (was 64)", "gone=None (was 1)", "optim.lr=0.0005 (was 0.001)"]
