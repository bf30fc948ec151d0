"""trainer.profile=N: where the time of N steps goes, as a trace for Perfetto and as a table."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from clip_train.data.files import write_atomic

log = logging.getLogger(__name__)

_WARM_UP = 2  # steps that allocate, choose kernels and wait for the first batches
_ROWS = 40


class StepProfile(Callback):
    """Profiles some steps after the first ones, on the first rank.

    `trace.json.gz` opens at ui.perfetto.dev; `table.txt` has the operators that take the most time of their own.

    Args:
        steps: how many.
        folder: where both files go.
        paused: stops the run's clocks while they are written.
    """

    def __init__(
        self, steps: int, folder: Path, paused: Callable[[L.Trainer], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.steps, self.folder, self.paused = steps, folder, paused
        self._seen = 0
        self._open = ExitStack()
        self._profile: profile | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module, batch, batch_idx) -> None:
        if self._seen == _WARM_UP and trainer.is_global_zero:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = self._open.enter_context(profile(activities=activities))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._seen += 1
        if self._seen == _WARM_UP + self.steps:
            with self.paused(trainer):  # on all ranks, as it may find that they must go back
                self._write()

    def on_train_end(self, trainer, pl_module) -> None:
        self._write()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._open.close()

    def _write(self) -> None:
        """What has been profiled, once."""
        if self._profile is None:
            return
        found, self._profile = self._profile, None
        self._open.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.folder) as unfinished:
            trace = Path(unfinished) / "trace.json.gz"
            found.export_chrome_trace(str(trace))
            trace.replace(self.folder / trace.name)
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=60)
        write_atomic(self.folder / "table.txt", table.encode())
        log.info("profiled steps %d to %d: wrote %s", _WARM_UP + 1, self._seen, self.folder)
