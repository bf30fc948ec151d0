"""The weights that an adapter-only checkpoint goes onto."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_train.checkpoints.folder import MANIFEST

_KEY = "base"  # of the manifest's `about`


@dataclass(frozen=True)
class Base:
    """What a checkpoint says of its base.

    Attributes:
        weights: where they were read from: a path, from the root, or a name on the Hub.
        ema: whether the averages of a checkpoint were taken.
        checksum: of the tensors under our names, whatever layout they are kept in; of an adapter-only checkpoint one of
            its own tensors and one of its base.
    """

    weights: str
    ema: bool
    checksum: str

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> "Base | None":
        """The base of the checkpoint whose manifest says `about`; None for one that holds all weights."""
        return cls(**about[_KEY]) if about.get(_KEY) else None

    def moved_to(self, weights: str) -> "Base":
        """The same, read from elsewhere: what is no checkpoint has averages as its weights."""
        return replace(self, weights=weights, ema=self.ema and (Path(weights) / MANIFEST).exists())

    def about(self) -> dict[str, Any]:
        """What the manifest says."""
        return {_KEY: asdict(self)}


def weights_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values, the same in any precision that holds the values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype)
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
