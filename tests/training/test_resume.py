import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from clip_train.errors import ConfigError
from clip_train.training.resume import Resume, find_checkpoint
from clip_train.training.run_folder import RunFolder
from tests.checkpoints.states import make_state
from tests.checkpoints.test_folder import save


def test_the_setting():
    cfg = OmegaConf.create({"resume": {"from": "auto", "allow": ["data"]}})
    assert Resume.of(cfg) == Resume("auto", ("data",))
    assert Resume.of(OmegaConf.create({"resume": "auto"})) == Resume("auto")
    with pytest.raises(ConfigError, match=r"resume.allow=model is none of data"):
        Resume.of(OmegaConf.create({"resume": {"from": "auto", "allow": ["model"]}}))


def test_a_restarted_run_goes_on_from_its_own_checkpoints(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    begin = save(tmp_path / "begin.ckpt", make_state(64))
    resume = Resume(str(begin))
    about = {"config": {"resume": {"from": str(begin), "allow": []}}}
    for variable in ("CLIP_TRAIN_RESTARTED", "TORCHELASTIC_RESTART_COUNT"):
        with monkeypatch.context() as patched:
            patched.setenv(variable, "1")
            found = find_checkpoint(folder, resume)
            assert found and found.path == begin  # nothing of its own was saved yet
            own = save(folder.checkpoints / "samples_00000000000128.ckpt", make_state(128), about)
            found = find_checkpoint(folder, resume)
            assert found and found.path == own
            later = save(folder.checkpoints / "samples_00000000000256.ckpt", make_state(256))
            found = find_checkpoint(folder, resume)
            assert found and found.path == begin  # another run's, which this one was to replace
        shutil.rmtree(later)
        found = find_checkpoint(folder, resume)
        assert found and found.path == begin  # not restarted
        shutil.rmtree(folder.path)


def test_a_run_restarted_by_a_scheduler_does_not_begin_anew(monkeypatch):
    cfg = OmegaConf.create({"resume": {"from": "never", "allow": []}})
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # after a refusal too
    assert Resume.of(cfg).source == "never"
    monkeypatch.setenv("CLIP_TRAIN_RESTARTED", "1")
    assert Resume.of(cfg).source == "auto"


def test_what_each_source_finds(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert find_checkpoint(folder, Resume("auto")) is None
    paths = [save(folder.checkpoints / f"samples_{seen:014d}.ckpt", make_state(seen)) for seen in (64, 1024)]
    found = find_checkpoint(folder, Resume("auto"))
    assert found and found.path == paths[1] and found.manifest.samples_seen == 1024
    assert find_checkpoint(folder, Resume("never")) is None
    found = find_checkpoint(folder, Resume(str(paths[0])))
    assert found and found.manifest.samples_seen == 64
    with pytest.raises(ConfigError, match="no such checkpoint"):
        find_checkpoint(folder, Resume(str(tmp_path / "none.ckpt")))
    Path(paths[0] / "state.pt").unlink()
    with pytest.raises(ConfigError, match=r"no valid checkpoint of clip-train: state.pt is missing"):
        find_checkpoint(folder, Resume(str(paths[0])))
