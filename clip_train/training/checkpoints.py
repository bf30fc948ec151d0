"""Checkpoints that are whole or absent, at a cadence in samples."""

import logging
import os
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

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
    """

    def __init__(self, folder: Path, every_samples: int | None, keep: int) -> None:
        self.folder, self.every_samples, self.keep = folder, every_samples, keep

    def on_train_batch_end(self, trainer, pl_module: ClipModule, outputs, batch, batch_idx) -> None:
        if passes(pl_module.samples_seen, pl_module.clock.batch_size, self.every_samples) and not trainer.should_stop:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        self._save(trainer, pl_module)

    def _save(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        path = self.folder / f"samples_{pl_module.samples_seen:014d}.ckpt"
        trainer.save_checkpoint(path)
        log.info("saved %s", path)
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("samples_*.ckpt"))[: -self.keep]:
                old.unlink()


def passes(samples_seen: int, batch_size: int, every_samples: int | None) -> bool:
    """Whether the last step reached or passed a multiple of `every_samples`."""
    return bool(every_samples) and samples_seen // every_samples > (samples_seen - batch_size) // every_samples
