import pytest
import torch
from safetensors.torch import load_file

from clip_train.checkpoints.folder import list_checkpoints
from clip_train.errors import ConfigError
from clip_train.interop.single_file import export_single_file
from tests.checkpoints.states import make_state
from tests.checkpoints.test_folder import flip, save
from tests.checkpoints.test_sharded import save_sharded
from tests.ranks import run_on_ranks


def test_a_sharded_checkpoint_becomes_one_file(tmp_path):
    run_on_ranks(save_sharded, 2, tmp_path, (2,))
    (checkpoint,) = list_checkpoints(tmp_path)
    assert export_single_file(checkpoint, tmp_path / "out" / "all.safetensors") == 3
    found = load_file(tmp_path / "out" / "all.safetensors")
    for name, weight in make_state()["state_dict"].items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def test_an_output_that_cannot_be_written(tmp_path):
    checkpoint = save(tmp_path / "samples_00000000000064.ckpt", make_state())
    for output in (tmp_path, checkpoint / "manifest.json" / "all.safetensors"):  # a folder; below a file
        with pytest.raises(ConfigError, match=r"^output=.*; give a file that can be written$"):
            export_single_file(checkpoint, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.name]


def test_a_broken_checkpoint_is_refused(tmp_path):
    checkpoint = save(tmp_path / "samples_00000000000064.ckpt", make_state())
    flip(checkpoint / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model.safetensors has changed"):
        export_single_file(checkpoint, tmp_path / "all.safetensors")
    assert not (tmp_path / "all.safetensors").exists()
