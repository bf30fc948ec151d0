import subprocess

import pytest

from clip_train.errors import RunExistsError
from clip_train.training.run_folder import RunFolder, environment
from tests.training.full_disk import room_for


def test_a_used_name_needs_resume(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.check_free_or_resumed("never")
    folder.create("a: 1")
    with pytest.raises(RunExistsError, match="resume=auto"):
        folder.check_free_or_resumed("never")
    folder.check_free_or_resumed("auto")


def test_a_full_disk_does_not_undo_a_finished_run(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    with room_for(10):
        folder.write_summary({"samples_seen": 96})
    assert list(tmp_path.iterdir()) == []
    assert "CANNOT WRITE" in caplog.text and '"samples_seen": 96' in caplog.text


def test_the_environment_names_the_code():
    found = environment()
    in_checkout = subprocess.run(["git", "rev-parse"], capture_output=True, check=False).returncode == 0
    if in_checkout:
        subprocess.run(["git", "merge-base", "--is-ancestor", str(found["git_commit"]), "HEAD"], check=True)
    assert isinstance(found.get("git_dirty", False), bool)
    assert found["wandb"]
