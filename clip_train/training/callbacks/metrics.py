"""What a run reports: every step's metrics, read from the device every few steps."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from clip_train.heartbeat import beat
from clip_train.training.callbacks.guard import Guard
from clip_train.training.instruments.limits import LimitLine
from clip_train.training.instruments.loader_times import LoaderTimes
from clip_train.training.instruments.step_times import DATA, StepTimes
from clip_train.training.instruments.utilisation import Utilisation
from clip_train.training.loggers.run_logger import RunLogger
from clip_train.training.module import ClipModule

log = logging.getLogger(__name__)

DataMetrics = Callable[[int], dict[str, float]]


def log_metrics(trainer: L.Trainer, samples_seen: int, metrics: dict[str, float], step: int | None = None) -> None:
    """Send metrics to every logger; each row carries `step` and `samples_seen`."""
    for logger in trainer.loggers:
        logger.log_metrics(
            {**metrics, "samples_seen": samples_seen}, step=trainer.global_step if step is None else step
        )


class TrainMetrics(Callback):
    """Logs loss, scale, rate, gradient norm, speed and where the time goes, for every step.

    Scalars stay on the device for `log_every` steps, so that a step does not wait for the device.

    Args:
        log_every: steps between two readings.
        batch_size: pairs per step.
        data_metrics: what else to log of the data, at a position of the stream.
        loader_times: told what each batch cost; logged.
        guard: judges every step that is read.
        utilisation: of the device, logged where it is known.
        limits: says what limits the run.

    Attributes:
        latest: the last values read, for the progress display and the summary.
        samples_per_second: over the whole run, without saving, evaluating, and the first step (it warms caches up).
    """

    def __init__(
        self,
        log_every: int,
        batch_size: int,
        data_metrics: DataMetrics,
        loader_times: LoaderTimes,
        guard: Guard,
        utilisation: Utilisation,
        limits: LimitLine,
    ) -> None:
        self.log_every, self.batch_size, self.guard = log_every, batch_size, guard
        self.data_metrics, self.loader_times = data_metrics, loader_times
        self.utilisation, self.limits = utilisation, limits
        self._times = StepTimes(torch.device("cpu"))
        self.latest: dict[str, float] = {}
        self._pending: list[tuple[int, int, dict[str, Tensor | float]]] = []
        self._step_end = self._first_step_end = 0.0
        self._window_start, self._waited, self._steps_timed = 0.0, 0.0, 0
        self._left_out, self._stopped_at = 0.0, cast(float | None, None)

    @property
    def samples_per_second(self) -> float:
        elapsed = self._step_end - self._first_step_end
        return self._steps_timed * self.batch_size / elapsed if elapsed > 0 else 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.resume_after(trainer.global_step, pl_module.samples_seen)
        self.utilisation.start(trainer, pl_module.device)
        self._times = pl_module.times = StepTimes(pl_module.device)
        self._times.enter(DATA)
        self._times.begin()
        self._step_end = self._window_start = self._clock()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._waited += self._clock() - self._step_end
        self._times.enter(None)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: ClipModule, outputs, batch, batch_idx) -> None:
        metrics = {**pl_module.step_metrics, **self.data_metrics(pl_module.position)}
        self.loader_times.add(batch["seconds"], len(batch["image"]))
        self.utilisation.add(batch)
        self._pending.append((trainer.global_step, pl_module.samples_seen, metrics))
        if len(self._pending) >= self.log_every or trainer.should_stop or not self.latest:
            self.flush(trainer)
        self._step_end = self._clock()
        if self._first_step_end:
            self._steps_timed += 1
        else:
            self._first_step_end = self._step_end
        self._times.enter(DATA)

    def on_train_end(self, trainer, pl_module) -> None:
        self.flush(trainer)

    @contextmanager
    def paused(self, trainer: L.Trainer) -> Iterator[None]:
        """Leave what happens inside, saving or evaluating, out of speed and waiting. Raises as `flush` does."""
        self.flush(trainer)  # what the device has yet to do would count as done, and its time would not
        beat()
        if self._stopped_at is not None:  # a checkpoint saved while evaluating
            yield
            beat()
            return
        start, self._stopped_at = time.perf_counter(), self._clock()
        try:
            with self._times.part(None):
                yield
        finally:
            beat()
            self._left_out += time.perf_counter() - start
            self._stopped_at = None

    def _clock(self) -> float:
        """Seconds, on a clock that stands still while paused."""
        return time.perf_counter() - self._left_out if self._stopped_at is None else self._stopped_at

    def in_bad_row(self, trainer: L.Trainer) -> bool:
        """Whether the last step changed nothing, so that it is better not to save now. Raises as `flush` does."""
        self.flush(trainer)
        return self.guard.in_bad_row

    def flush(self, trainer: L.Trainer) -> None:
        """Read and log all steps so far.

        Raises:
            RollBack, DivergedError: too many of them in a row had no finite loss or gradient.
        """
        if not self._pending:
            return
        warmed_up = bool(self.latest)  # the first step waits for workers to start
        rows = _read([metrics for *_, metrics in self._pending])
        now = self._clock()  # after the device has caught up
        elapsed = now - self._window_start
        speed = {
            "train/samples_per_second": len(self._pending) * self.batch_size / elapsed,
            "train/data_wait_fraction": self._waited / elapsed,
            **self.utilisation.metrics(elapsed),
            **self._step_times(trainer, elapsed, warmed_up),
            **self.loader_times.metrics(),
        }
        for (step, samples_seen, _), row in zip(self._pending, rows, strict=True):
            self.guard.note(step, samples_seen, row)
            self.latest = {**row, **speed}
            log_metrics(trainer, samples_seen, self.latest, step)
        self._pending = []
        self._window_start, self._waited = now, 0.0
        self.loader_times.forget()
        self.guard.act(trainer, cast(ClipModule, trainer.lightning_module))

    def _step_times(self, trainer: L.Trainer, elapsed: float, warmed_up: bool) -> dict[str, float]:
        """Milliseconds of a step and of its parts; says what limits the run, when that is due."""
        steps, found = len(self._pending), self._times.read()
        step, parts = elapsed / steps, {part: seconds / steps for part, seconds in found.seconds.items()}
        if warmed_up and trainer.is_global_zero:
            advice, last = self.loader_times.advice(), trainer.should_stop
            if line := self.limits.line(self._steps_timed, parts, step, found.lag, advice, last):
                log.info("%s", line)
        return {f"train/time/{name}_ms": 1e3 * seconds for name, seconds in {"step": step, **parts}.items()}


def _read(rows: list[dict[str, Tensor | float]]) -> list[dict[str, float]]:
    """Rows of plain numbers, by one transfer from the device."""
    tensors = [value.float() for row in rows for value in row.values() if isinstance(value, Tensor)]
    values = iter(torch.stack(tensors).tolist())
    return [{k: next(values) if isinstance(v, Tensor) else v for k, v in row.items()} for row in rows]
