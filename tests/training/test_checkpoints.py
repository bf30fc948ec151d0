import pytest
import torch

from clip_train.training.checkpoints import AtomicCheckpointIO, passes


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("the disk is full")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "folder" / "a.ckpt"
    storage = AtomicCheckpointIO()
    storage.save_checkpoint({"weight": torch.ones(3)}, path)
    with pytest.raises(RuntimeError, match="disk is full"):
        storage.save_checkpoint({"weight": torch.zeros(3), "bad": Unpicklable()}, path)
    assert torch.equal(storage.load_checkpoint(path)["weight"], torch.ones(3))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"weight": Exception("any object that is not plain data")}, tmp_path / "a.ckpt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


def test_cadence():
    reached = [seen for seen in range(32, 321, 32) if passes(seen, 32, every_samples=100)]
    assert reached == [128, 224, 320]
    assert not passes(32, 32, None)
