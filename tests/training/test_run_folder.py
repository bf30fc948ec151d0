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
