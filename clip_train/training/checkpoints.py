"""Checkpoints that are whole or absent, at a cadence in samples."""

import logging
import os
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from clip_train.errors import ConfigError
from clip_train.training.metrics import TrainMetrics
from clip_train.training.module import ClipModule

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes under a temporary name, then renames; reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def load_checkpoint(self, path, map_location="cpu", weights_only=True) -> dict:
        return torch.load(path, map_location="cpu", weights_only=True)


class Checkpointing(Callback):
    """Saves every `every_samples` samples and at the end, and keeps the newest `keep`.

    Args:
        folder: where `samples_<count>.ckpt` go.
        every_samples: cadence; None saves at the end only.
        keep: how many to keep.
        metrics: read before each save, so that a run that has diverged is not saved.
    """

    def __init__(self, folder: Path, every_samples: int | None, keep: int, metrics: TrainMetrics) -> None:
        self.folder, self.every_samples, self.keep, self.metrics = folder, every_samples, keep, metrics

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        if trainer.is_global_zero:  # what lies ahead of a run resumed from an older checkpoint is another run's future
            for path in self.folder.glob("samples_*.ckpt"):
                if path.name > _name(pl_module.samples_seen):
                    path.unlink()

    def on_train_batch_end(self, trainer, pl_module: ClipModule, outputs, batch, batch_idx) -> None:
        if passes(pl_module.samples_seen, pl_module.clock.batch_size, self.every_samples) and not trainer.should_stop:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        self._save(trainer, pl_module)

    def _save(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        self.metrics.flush(trainer)
        path = self.folder / _name(pl_module.samples_seen)
        with self.metrics.paused():
            trainer.save_checkpoint(path)
        log.info("saved %s", path)
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("samples_*.ckpt"))[: -self.keep]:
                old.unlink()


def _name(samples_seen: int) -> str:
    return f"samples_{samples_seen:014d}.ckpt"


def read_samples_seen(path: Path, model: nn.Module) -> int:
    """Where a checkpoint stands, after making sure that it belongs to this model.

    Raises:
        ConfigError: it is no checkpoint of ours, or one of another model.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        samples_seen, weights = checkpoint["samples_seen"], checkpoint["state_dict"]
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise ConfigError(f"resume: {path} is no checkpoint of clip-train ({reason})") from error
    expected = {f"model.{name}": weight.shape for name, weight in model.state_dict().items()}
    found = {name: weight.shape for name, weight in weights.items()}
    if different := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise ConfigError(f"resume: {path} is of another model: {len(different)} weights differ, first {different[0]}")
    return samples_seen


def passes(samples_seen: int, batch_size: int, every_samples: int | None) -> bool:
    """Whether the last step reached or passed a multiple of `every_samples`."""
    return bool(every_samples) and samples_seen // every_samples > (samples_seen - batch_size) // every_samples
