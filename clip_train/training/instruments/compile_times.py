"""What torch.compile costs a run: how many graphs it made and in how long, and whether it made some too late."""

import logging
import time
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch._dynamo.callback import callback_handler
from torch._dynamo.utils import counters

from clip_train.heartbeat import beat
from clip_train.training.module import ClipModule

log = logging.getLogger(__name__)

_START_UP = 3  # steps after which training has seen all there is to compile


class CompileTimes(Callback):
    """Adds up what torch tells of its compilations, and logs it as `train/compile_seconds` and in a line.

    A graph that is made in a later step gets a warning; those of the first evaluation do not.

    Attributes:
        seconds: compiling took, forward, backward and graphs' recording.
        graphs: that were compiled.
    """

    def __init__(self) -> None:
        self.seconds, self.graphs = 0.0, 0
        self._begun = 0.0
        self._steps = self._graphs_of_step = self._others_graphs = 0

    def setup(self, trainer: L.Trainer, pl_module, stage: str) -> None:
        self._others_graphs = _all_graphs()
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._graphs_of_step = self.graphs

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: ClipModule, outputs, batch, batch_idx) -> None:
        self._steps += 1
        pl_module.step_metrics["train/compile_seconds"] = self.seconds
        if self._steps == _START_UP:
            self._report(trainer)
        if self._steps > _START_UP and (late := self.graphs - self._graphs_of_step):
            log.warning("step %d compiled %d graph(s) more: TORCH_LOGS=recompiles says why", trainer.global_step, late)

    def on_train_end(self, trainer: L.Trainer, pl_module) -> None:
        if self._steps < _START_UP:
            self._report(trainer)

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._forget()

    def teardown(self, trainer, pl_module, stage: str) -> None:
        self._forget()

    def _report(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            log.info("compiled %d graph(s) in %.1f s", self.graphs, self.seconds)

    def _forget(self) -> None:
        if self._start in callback_handler.start_callbacks:
            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._end)

    def _start(self, args: Any) -> None:
        self._begun = time.perf_counter()

    def _end(self, args: Any) -> None:
        self.seconds += time.perf_counter() - self._begun
        self.graphs = _all_graphs() - self._others_graphs
        beat()  # a compilation that ends is a sign of life


def _all_graphs() -> int:
    """Compiled in this process so far."""
    return cast(int, counters["stats"]["unique_graphs"])
