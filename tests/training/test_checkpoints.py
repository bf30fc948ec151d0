from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from clip_train.training.checkpoints import AtomicCheckpointIO, Checkpointing, passes
from clip_train.training.loader_times import LoaderTimes
from clip_train.training.metrics import TrainMetrics


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


def test_what_lies_ahead_of_a_resumed_run_goes_and_the_newest_stay(tmp_path):
    metrics = TrainMetrics(10, 32, lambda samples_seen: {}, LoaderTimes(0, 1, "fast"))
    checkpointing = Checkpointing(tmp_path, None, keep=2, metrics=metrics)
    for samples in (500, 2000, 3000):
        (tmp_path / f"samples_{samples:014d}.ckpt").touch()
    trainer = SimpleNamespace(is_global_zero=True, save_checkpoint=lambda path: path.touch())
    module = SimpleNamespace(samples_seen=1000)
    checkpointing.on_train_start(cast(Any, trainer), cast(Any, module))
    for samples in (1500, 2500):
        module.samples_seen = samples
        checkpointing.on_train_end(cast(Any, trainer), cast(Any, module))
    assert sorted(int(path.stem.split("_")[1]) for path in tmp_path.iterdir()) == [1500, 2500]


def test_cadence():
    reached = [seen for seen in range(32, 321, 32) if passes(seen, 32, every_samples=100)]
    assert reached == [128, 224, 320]
    assert not passes(32, 32, None)
