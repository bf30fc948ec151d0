"""An exponential moving average of the weights, kept beside them and evaluated in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clip_train.checkpoints.restore import cut_like
from clip_train.models.locking import fixed_names
from clip_train.training.module import ClipModule


class WeightAverage(Callback):
    """Averages what training changes: trainable weights, and the statistics of batch norms.

    In fp32, as bf16 has no room for small changes. Of sharded weights each rank averages its own part.

    Args:
        decay: what stays of the average in a step; less in the first steps, (1 + t) / (10 + t) after step t, so that
            the first weights are soon forgotten.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._averages: dict[str, Tensor] = {}
        self._saved: Mapping[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        tensors = _averaged_tensors(pl_module)
        self._averages = {name: tensor.float().clone() for name, tensor in tensors.items()}
        for name in self._averages.keys() & self._saved.keys():
            self._averages[name].copy_(cut_like(self._saved[name], tensors[name]))
        self._saved = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: ClipModule, outputs, batch, batch_idx) -> None:
        """Move the averages towards the weights; a bad step leaves them where they are, without asking the host."""
        norm = torch.as_tensor(pl_module.step_metrics["train/grad_norm"])
        step = pl_module.samples_seen // pl_module.clock.batch_size
        share = (1 - self.decay_after(step)) * norm.isfinite().float()
        tensors = _averaged_tensors(pl_module)
        shares = {device: share.to(device) for device in {average.device for average in self._averages.values()}}
        with torch.no_grad():
            for name, average in self._averages.items():
                _local(average).lerp_(_local(tensors[name]).float(), shares[average.device])

    def decay_after(self, step: int) -> float:
        """What stays of the average in a step; the first is step 1."""
        return min(self.decay, (1 + step) / (10 + step))

    @contextmanager
    def in_place_of_weights(self, module: ClipModule) -> Iterator[None]:
        """The averages as the module's weights, while this lasts. Takes memory for another copy."""
        tensors = _averaged_tensors(module)
        with torch.no_grad():
            own = {name: _local(tensor).clone() for name, tensor in tensors.items()}
            for name, average in self._averages.items():
                _local(tensors[name]).copy_(_local(average))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    _local(tensors[name]).copy_(value)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: ClipModule, checkpoint: dict) -> None:
        checkpoint["ema"] = dict(self._averages)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: ClipModule, checkpoint: dict) -> None:
        self._saved = checkpoint.get("ema", {})


def _averaged_tensors(module: nn.Module) -> dict[str, Tensor]:
    """By the names of the state dict: what training changes, but for counters."""
    kept = module.state_dict(keep_vars=True)
    fixed = fixed_names(module)
    return {name: t.detach() for name, t in kept.items() if t.is_floating_point() and name not in fixed}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
