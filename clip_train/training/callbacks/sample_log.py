"""Which samples every step trained on, for those who have to know."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from clip_train.data.batches import Batch
from clip_train.training.loggers.rows import RowsFile, drop_rows_after, read_rows
from clip_train.training.module import ClipModule

_COLUMNS = ("samples_seen", "sample")


class SampleLog(Callback):
    """Writes one file per rank, a row per sample, with the samples seen when its step has ended.

    Before the step: a checkpoint of it, which one rank writes, must not find that another has died without its rows.
    Those of a step that is taken again are dropped.

    Args:
        folder: where to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: RowsFile | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        if trainer.is_global_zero:
            for path in self.folder.glob("*.csv"):  # of an earlier part of the run, on whatever ranks
                drop_rows_after(path, pl_module.samples_seen)
        self._file = RowsFile(self.folder / f"rank_{trainer.global_rank:05d}.csv", _COLUMNS)
        trainer.strategy.barrier()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: ClipModule, batch: Batch, batch_idx: int) -> None:
        assert self._file is not None
        seen = pl_module.samples_seen + pl_module.clock.batch_size
        self._file.append((seen, name) for name in batch["names"])


def read_sample_log(folder: Path) -> dict[int, list[str]]:
    """The samples of each step, sorted, by the samples seen at its end."""
    steps: dict[int, list[str]] = {}
    for path in folder.glob("*.csv"):
        for samples_seen, name in read_rows(path):
            steps.setdefault(int(samples_seen), []).append(name)
    return {samples_seen: sorted(steps[samples_seen]) for samples_seen in sorted(steps)}
