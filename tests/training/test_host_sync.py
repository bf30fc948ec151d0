"""A step asks the device for no number: metrics wait there until they are read, every so many steps."""

from collections import Counter
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clip_train.losses import contrastive_loss, sigmoid_loss, tiles
from tests.training.test_module import OPTIM, train
from tests.training.test_step_times import train_metrics

aten = torch.ops.aten
# What needs a number from the device, or a shape that follows from numbers there.
_WAITING = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten._unique2, aten.is_nonzero)
_INDEXING = (aten.index, aten.index_put, aten.index_put_)


class Questions(TorchDispatchMode):
    """Counts what a host with an accelerator would wait for, in the steps between two readings.

    On a processor nothing waits, and whole numbers on the host, such as sizes, are no different from those of a device:
    of these only single ones are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket in _INDEXING and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func.overloadpacket in _WAITING or by_mask:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def watching(self, name: str) -> Any:
        """The method of Tensor that copies to the host, counted while this is on."""
        method = getattr(Tensor, name)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.on and (tensor.is_floating_point() or tensor.dtype == torch.bool):
                self.found[name] += 1
            return method(tensor, *args, **kwargs)

        return call

    on = False


class Watched(L.Callback):
    """Watches from the second step, as the first is read at once, to the one before the last."""

    def __init__(self, questions: Questions, steps: int, micro_batch_size: int | None) -> None:
        self.questions, self.last, self.micro_batch_size = questions, steps - 1, micro_batch_size
        self.watched = 0

    def on_train_start(self, trainer, pl_module: Any) -> None:
        pl_module.micro_batch_size = self.micro_batch_size

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if 0 < trainer.global_step < self.last:
            self.questions.on = True
            self.questions.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.questions.on:
            self.questions.__exit__(None, None, None)
            self.questions.on = False
            self.watched += 1


def questions_of(folder, monkeypatch, loss, micro_batch_size=None, optim=OPTIM) -> Counter[str]:
    questions = Questions()
    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, name, questions.watching(name))
    monkeypatch.setattr(tiles, "_close", lambda *_: False)  # a look at the numbers that only a processor takes
    watched = Watched(questions, steps=5, micro_batch_size=micro_batch_size)
    # Callbacks end a step in their order: metrics are taken, and not read, while it is still watched.
    train("32", 5, folder, loss=loss, optim=optim, callbacks=[train_metrics(log_every=100), watched])
    assert watched.watched == 3
    return questions.found


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_loss])
def test_a_step_asks_for_nothing(tmp_path, monkeypatch, loss, micro_batch_size):
    if loss is sigmoid_loss:
        loss = _with_bias
    assert questions_of(tmp_path, monkeypatch, loss, micro_batch_size) == {}


def _with_bias(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    return sigmoid_loss(image, text, logit_scale, torch.zeros(()))


@pytest.mark.parametrize(
    "question",
    [
        lambda loss: float(loss),
        lambda loss: loss.detach().cpu(),
        lambda loss: loss.detach().tolist(),
        lambda loss: bool(loss > 0),
        lambda loss: loss.detach().reshape(1)[loss.reshape(1) > 0],
    ],
)
def test_a_loss_that_asks_is_found_out(tmp_path, monkeypatch, question):
    def loss(*features, **parameters):
        value = contrastive_loss(*features, **parameters)
        question(value)
        return value

    assert sum(questions_of(tmp_path, monkeypatch, loss).values()) >= 3


class Strict(L.Callback):
    """CUDA raises what would wait, from the second step to the one before the last."""

    def __init__(self, micro_batch_size: int | None = None) -> None:
        self.micro_batch_size, self.steps = micro_batch_size, 0

    def on_train_start(self, trainer, pl_module: Any) -> None:
        pl_module.micro_batch_size = self.micro_batch_size

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        strict = 0 < trainer.global_step < 4
        self.steps += strict
        torch.cuda.set_sync_debug_mode("error" if strict else "default")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for(tmp_path):
    strict = Strict()
    try:
        train("32", 5, tmp_path, callbacks=[train_metrics(log_every=100), strict], accelerator="gpu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert strict.steps == 3  # without an error
