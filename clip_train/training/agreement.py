"""What all ranks must decide together, once per step: stopping by a signal, and giving up on bad data."""

import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from clip_train.data.batches import Batch
from clip_train.distributed import gather_strings, group_size, host_group
from clip_train.errors import DataError
from clip_train.training.metrics import TrainMetrics
from clip_train.training.module import ClipModule

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NAMED_KEYS = 5
_GRACE_SAMPLES = 1000


class RankAgreement(Callback):
    """Ends the run at the end of a step that all ranks finish, whichever rank got the signal or the bad sample.

    One reduction of three integers per step, through the host, so that it does not wait for the accelerator. A second
    SIGINT stops at once.

    Args:
        metrics: told the number of bad samples.
        max_bad_fraction: share of the samples seen that may be unusable; of the first 1000, the share of 1000.

    Attributes:
        stopped_by_signal: the run was cut short and can be resumed.
    """

    def __init__(self, metrics: TrainMetrics, max_bad_fraction: float) -> None:
        self.metrics, self.max_bad_fraction = metrics, max_bad_fraction
        self.stopped_by_signal = False
        self._signalled = False
        self._bad_keys: list[str] = []
        self._group: Any = None

    def setup(self, trainer, pl_module, stage) -> None:
        if group_size() > 1:
            self._group = host_group()

    def on_train_start(self, trainer, pl_module) -> None:
        for number in _STOP_SIGNALS:  # after Lightning's own, whose handler broadcasts while a step may be running
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: ClipModule, batch: Batch, batch_idx: int) -> None:
        failed, signalled, bad = self._sum([bool(batch["error"]), self._signalled, len(batch["bad"])])
        self._bad_keys = (self._bad_keys + batch["bad"])[:_NAMED_KEYS]
        if failed:
            raise DataError(gather_strings([batch["error"]] if batch["error"] else [], self._group)[0])
        self.metrics.bad_samples += bad
        seen = pl_module.samples_seen + pl_module.clock.batch_size
        if self.metrics.bad_samples > self.max_bad_fraction * max(seen, _GRACE_SAMPLES):
            keys = ", ".join(gather_strings(self._bad_keys, self._group)[:_NAMED_KEYS])
            raise DataError(
                f"{self.metrics.bad_samples} of {seen} samples cannot be used, more than"
                f" data.max_bad_fraction={self.max_bad_fraction:g}; first: {keys}"
            )
        if signalled:
            self.stopped_by_signal = True
            trainer.should_stop = True  # after this step

    def _sum(self, local: list[int | bool]) -> list[int]:
        total = torch.tensor(local, dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return total.tolist()
