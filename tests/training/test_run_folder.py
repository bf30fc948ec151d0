import subprocess

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch.distributed import HashStore

from clip_train.errors import ConfigError, RunExistsError
from clip_train.training.launch import World
from clip_train.training.run_folder import RunFolder, default_run_name, environment
from clip_train.training.torchrun import Stores
from tests.training.full_disk import room_for


def test_a_used_name_needs_resume(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.check_free_or_resumed("never")
    folder.create("a: 1")
    with pytest.raises(RunExistsError, match="resume=auto"):
        folder.check_free_or_resumed("never")
    folder.check_free_or_resumed("auto")


def test_checkpoints_alone_make_a_name_used(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (folder.checkpoints / "samples_00000000000064.ckpt").mkdir(parents=True)
    with pytest.raises(RunExistsError, match="resume=auto"):
        folder.check_free_or_resumed("never")
    folder.check_free_or_resumed("auto")


def world(environment, devices: int = 2, num_nodes: int = 1) -> World:
    return World("cpu", devices, num_nodes, 0, environment)


def test_processes_of_a_job_have_its_name(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert default_run_name("vit", world(SLURMEnvironment(auto_requeue=False))) == "12.0_vit"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b32")
    assert default_run_name("vit", world(TorchElasticEnvironment())) == "b32_vit"


def test_processes_of_an_unnamed_torchrun_share_a_name_through_its_store(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    unnamed = World("cpu", 2, 1, 0, TorchElasticEnvironment(), Stores(HashStore(), None))
    first = default_run_name("vit", unnamed)
    assert first.endswith("_vit")
    assert default_run_name("later", unnamed) == first


def test_what_lightning_starts_has_the_name_of_the_first_process(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("CLIP_TRAIN_RUN_NAME", "of a run before")
    first = default_run_name("vit", world(LightningEnvironment()))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert first.endswith("_vit") and default_run_name("later", world(LightningEnvironment())) == first
    monkeypatch.delenv("CLIP_TRAIN_RUN_NAME")
    with pytest.raises(ConfigError, match="give run_name=NAME"):
        default_run_name("vit", world(LightningEnvironment()))
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match="give run_name=NAME"):
        default_run_name("vit", world(LightningEnvironment(), num_nodes=2))


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
