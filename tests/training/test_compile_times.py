"""A run with compiled blocks: what it learns, what it leaves, and what compiling took."""

import logging
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from clip_train.models.compiling import compile_blocks
from clip_train.training.instruments.compile_times import CompileTimes
from clip_train.training.module import ClipModule
from tests.models.test_compiling import fresh as fresh
from tests.training.test_module import train


class Compiled(Callback):
    """What the switch does, but that no C++ is made of what is traced."""

    def setup(self, trainer: L.Trainer, pl_module: ClipModule, stage: str) -> None:
        compile_blocks(pl_module.model, backend="aot_eager")


class NoteLosses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_train_batch_end(self, trainer, pl_module: ClipModule, outputs, batch, batch_idx) -> None:
        self.losses.append(float(pl_module.step_metrics["train/loss"]))
        self.seconds.append(float(pl_module.step_metrics.get("train/compile_seconds", 0)))


class StopEarly(Callback):
    """After two steps of a longer run."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.should_stop |= trainer.global_step == 2


class AnotherBatchSize(Callback):
    """A step with one pair alone, which is compiled apart."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            batch["image"], batch["text"] = batch["image"][:1], batch["text"][:1]


def test_checkpoints_go_from_compiled_to_eager_and_back(tmp_path: Path, caplog):
    """The runs all end alike: eager, compiled, and begun by one and gone on with by the other."""
    times, notes = CompileTimes(), [NoteLosses() for _ in range(4)]
    compiled = Compiled()
    with caplog.at_level(logging.INFO, logger="clip_train"):
        _, half = run(tmp_path / "compiled", callbacks=[compiled, times, notes[0], StopEarly()])
    assert times.graphs == 2 and times.seconds > 0  # a kind of block in each tower, two blocks of each
    assert f"compiled 2 graph(s) in {times.seconds:.1f} s" in caplog.text
    assert notes[0].seconds == [times.seconds] * 2

    eager, end = run(tmp_path / "eager", callbacks=[notes[1]])
    names = list(torch.load(end, weights_only=True)["state_dict"])
    assert list(torch.load(half, weights_only=True)["state_dict"]) == names
    assert not [name for name in names if "_orig_mod" in name]

    gone_on, _ = run(tmp_path / "eager_then", resume=half, callbacks=[notes[2]])
    _, eager_half = run(tmp_path / "eager_half", callbacks=[StopEarly()])
    compiled_then, _ = run(tmp_path / "compiled_then", resume=eager_half, callbacks=[compiled, notes[3]])
    assert notes[0].losses == pytest.approx(notes[1].losses[:2], rel=1e-5)
    for ended, losses in ((gone_on, notes[2].losses), (compiled_then, notes[3].losses)):
        assert losses == pytest.approx(notes[1].losses[2:], rel=1e-5)
        for (name, found), expected in zip(ended.named_parameters(), eager.parameters(), strict=True):
            # Adam makes something of key biases' gradients, which are rounding alone.
            assert (found - expected).norm() <= 1e-4 * expected.norm() + 2e-5, name


def run(folder: Path, callbacks: list[Callback], resume: Path | None = None) -> tuple[ClipModule, Path]:
    """Four steps."""
    folder.mkdir()
    torch.manual_seed(0)
    return train("32", 4, folder, resume, callbacks=callbacks)


def test_what_is_compiled_late_gets_a_warning(tmp_path: Path, caplog):
    times = CompileTimes()
    with caplog.at_level(logging.INFO, logger="clip_train"):
        train("32", 6, tmp_path, callbacks=[Compiled(), times, AnotherBatchSize(step=4)])
    assert times.graphs == 4
    said = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
    assert len(said) == 2 and said[0].startswith("compiled 2 graph(s) in ")
    assert said[1] == "step 5 compiled 2 graph(s) more: TORCH_LOGS=recompiles says why"


def test_a_run_that_fails_leaves_no_callback(tmp_path: Path):
    from torch._dynamo.callback import callback_handler

    class Failure(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            raise RuntimeError("a fault")

    before = len(callback_handler.start_callbacks), len(callback_handler.end_callbacks)
    with pytest.raises(RuntimeError, match="a fault"):
        train("32", 2, tmp_path, callbacks=[CompileTimes(), Failure()])
    assert (len(callback_handler.start_callbacks), len(callback_handler.end_callbacks)) == before
