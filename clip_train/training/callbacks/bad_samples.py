"""The samples that could not be used: counted by kind, listed in a file, and too many of them end the run."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from clip_train.data.batches import BadSample
from clip_train.errors import DataError
from clip_train.training.loggers.rows import RowsFile, drop_rows_after
from clip_train.training.module import ClipModule

log = logging.getLogger(__name__)

_LOGGED = 20
_NAMED = 5
_GRACE_SAMPLES = 1000


class BadSamples(Callback):
    """What was found on any rank; every rank keeps the same count, the first one writes.

    Args:
        path: `bad_samples.csv` of the run folder.
        max_fraction: share of the samples seen that may be unusable; of the first 1000, the share of 1000.

    Attributes:
        by_kind: how many of each kind; part of the checkpoint.
    """

    def __init__(self, path: Path, max_fraction: float) -> None:
        self.path, self.max_fraction = path, max_fraction
        self._file = RowsFile(path, ["samples_seen", *BadSample._fields])
        self.by_kind: Counter[str] = Counter()
        self._first: list[str] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        if trainer.is_global_zero:
            drop_rows_after(self.path, pl_module.samples_seen)

    def add(self, found: Sequence[BadSample], samples_seen: int, write: bool) -> None:
        """Take note of what all ranks found in the step that ends at `samples_seen`.

        Raises:
            DataError: there are more than may be.
        """
        logged = self.by_kind.total()
        self.by_kind.update(sample.kind for sample in found)
        self._first = (self._first + [f"{sample.key} in {sample.shard}" for sample in found])[:_NAMED]
        if write:
            self._file.append([samples_seen, *sample] for sample in found)
            for sample in found[: max(_LOGGED - logged, 0)]:
                log.warning("bad sample %s in %s: %s (%s)", sample.key, sample.shard, sample.kind, sample.reason)
            if logged < _LOGGED <= self.by_kind.total():
                log.warning("further bad samples are only listed in %s", self.path)
        if self.by_kind.total() > self.max_fraction * max(samples_seen, _GRACE_SAMPLES):
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.by_kind.most_common())
            raise DataError(
                f"{self.by_kind.total()} of {samples_seen} samples cannot be used ({kinds}), more than"
                f" data.max_bad_fraction={self.max_fraction:g}; first: {', '.join(self._first)}"
            )

    def metrics(self) -> dict[str, float]:
        """`data/bad_samples`, and of each kind found."""
        kinds = {f"data/bad_samples/{kind}": float(count) for kind, count in sorted(self.by_kind.items())}
        return {"data/bad_samples": float(self.by_kind.total()), **kinds}

    def state_dict(self) -> dict[str, int]:
        return dict(self.by_kind)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.by_kind = Counter(state_dict)
