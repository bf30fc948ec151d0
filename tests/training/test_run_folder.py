import pytest

from clip_train.errors import ConfigError, RunExistsError
from clip_train.training.run_folder import RunFolder


def test_a_used_name_needs_resume(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.check_free_or_resumed("never")
    folder.create("a: 1")
    with pytest.raises(RunExistsError, match="resume=auto"):
        folder.check_free_or_resumed("never")
    folder.check_free_or_resumed("auto")


def test_the_checkpoint_to_resume(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.checkpoint_to_resume("auto") is None
    folder.checkpoints.mkdir(parents=True)
    for name in ("samples_00000000000064.ckpt", "samples_00000000001024.ckpt", "samples_00000000002048.ckpt.77.tmp"):
        (folder.checkpoints / name).touch()
    assert folder.checkpoint_to_resume("auto") == folder.checkpoints / "samples_00000000001024.ckpt"
    assert folder.checkpoint_to_resume("never") is None
    with pytest.raises(ConfigError, match="no such checkpoint"):
        folder.checkpoint_to_resume(str(tmp_path / "none.ckpt"))
