"""The progress display: a bar in a terminal, a line every `trainer.log_every` steps elsewhere."""

import logging
from datetime import timedelta

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clip_train.training.callbacks.metrics import TrainMetrics
from clip_train.training.module import ClipModule

log = logging.getLogger(__name__)


class ProgressDisplay(Callback):
    """Shows step, loss, rate, samples/s, utilisation if known, share of time waiting for data, and the time left."""

    def __init__(self, metrics: TrainMetrics, console: Console) -> None:
        self.metrics, self.console = metrics, console
        self._bar: Progress | None = None
        self._shown: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        if trainer.is_global_zero and self.console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.percentage:.0f}%  {task.fields[status]}"))
            times = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(elapsed_when_finished=False))
            self._bar = Progress(TextColumn("training"), *columns, *times, console=self.console)
            self._bar.add_task("", total=pl_module.clock.total_samples, completed=pl_module.samples_seen, status="")
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: ClipModule, outputs, batch, batch_idx) -> None:
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=pl_module.samples_seen, status=self._status(trainer))
        elif trainer.is_global_zero and self.metrics.latest is not self._shown:  # read again in this step
            self._shown = self.metrics.latest
            log.info("%s", self._line(trainer, pl_module))

    def on_train_end(self, trainer, pl_module) -> None:
        self._stop()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _line(self, trainer: L.Trainer, pl_module: ClipModule) -> str:
        seen, total = pl_module.samples_seen, pl_module.clock.total_samples
        speed = self.metrics.samples_per_second
        left = f"  ETA {timedelta(seconds=round((total - seen) / speed))}" if speed else ""
        return f"{seen / total:.0%}  {seen:,}/{total:,} samples  {self._status(trainer)}{left}"

    def _status(self, trainer: L.Trainer) -> str:
        if not (latest := self.metrics.latest):
            return ""
        utilisation = f"  mfu {latest['train/mfu']:.0%}" if "train/mfu" in latest else ""
        return (
            f"step {trainer.global_step}  loss {latest['train/loss']:.3f}  lr {latest['train/lr']:.2e}"
            f"  {latest['train/samples_per_second']:,.0f} samples/s"
            f"{utilisation}  data wait {latest['train/data_wait_fraction']:.0%}"
        )
