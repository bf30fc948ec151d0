"""The features of a training set under a frozen image tower: computed once, shared by all ranks, kept on disk."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from clip_train.checkpoints.base import weights_checksum
from clip_train.data.eval_batches import EvalBatches
from clip_train.data.feature_batches import FeatureBatches, FeatureTable, chunk_parts, chunk_paths, write_chunk
from clip_train.data.fingerprint import describe_shards
from clip_train.data.loader import make_loader
from clip_train.distributed import group_rank, group_size, raise_everywhere
from clip_train.errors import DataError
from clip_train.evaluation.zero_shot import class_embeddings
from clip_train.heartbeat import beat
from clip_train.models.linear_probe import LinearProbe
from clip_train.training.data_module import ClipDataModule
from clip_train.training.fsdp import whole_weights
from clip_train.training.module import ClipModule

log = logging.getLogger(__name__)


class ProbeStart(Callback):
    """Before the first step of a linear probe: its head's start, and the features that it learns from.

    Args:
        data: told to serve features in place of pictures.
        folder: where the features are kept, theirs alone.
        batch_size: pictures per forward pass on a rank.
        fresh: the run begins, and its head with it.
    """

    def __init__(self, data: ClipDataModule, folder: Path, batch_size: int, fresh: bool) -> None:
        self.data, self.folder, self.batch_size, self.fresh = data, folder, batch_size, fresh

    def on_fit_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        probe, precision = cast(LinearProbe, pl_module.model), trainer.precision_plugin
        pictures = self.data.unaugmented()
        with whole_weights(probe):
            if self.fresh and probe.initial_head == "zero_shot":
                where = {"batch_size": self.batch_size, "device": pl_module.device}
                with precision.forward_context():
                    names = class_embeddings(probe.encode_text, probe.classes, pictures.tokenizer, **where)
                probe.start_from_names(names)
            compute_features(
                probe.image_features,
                pictures,
                self.folder,
                batch_size=self.batch_size,
                num_workers=self.data.num_workers,
                autocast=precision.forward_context,
                device=pl_module.device,
            )
        table, error = None, ""
        try:
            table = FeatureTable.open(self.folder, len(pictures))
        except DataError as failed:  # on this rank, perhaps alone
            error = str(failed)
        raise_everywhere(error)
        assert table
        self.data.serve_features(FeatureBatches(table, self.data.batches))


def features_key(probe: LinearProbe, pictures: EvalBatches, image_key: str | list[str], precision: str) -> str:
    """Differs where another set, another tower, or another preparation of pictures gives other features.

    To be asked before the weights go to a device, or are sharded.
    """
    tower = dict(probe.vision.state_dict())
    about = {
        "tower": weights_checksum(tower),
        "layers": repr(probe.vision),  # activations and pooling, which have no weights
        "features": probe.features,
        "shards": describe_shards(pictures.reader),
        "files": [_version(name) for name in pictures.reader.shard_names],
        "image_key": image_key,
        "pictures": [pictures.image_size, pictures.resize_mode, pictures.interpolation, pictures.max_image_pixels],
        "pixels": [probe.image_mean.flatten().tolist(), probe.image_std.flatten().tolist()],
        "classes": len(probe.classes),
        "precision": precision,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _version(shard: str) -> tuple[str, int, int]:
    """Its path or address, and of a file here its size and when it was written."""
    if not os.path.exists(shard):
        return shard, 0, 0
    found = os.stat(shard)
    return os.path.abspath(shard), found.st_size, found.st_mtime_ns


@torch.no_grad()
def compute_features(
    image_features: Callable[[Tensor], Tensor],
    pictures: EvalBatches,
    folder: Path,
    *,
    batch_size: int,
    num_workers: int,
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
) -> None:
    """Write what is missing of a set's features; the ranks share the files among them.

    Raises:
        DataError: on every rank, if a shard cannot be read or a file not be written.
    """
    parts = chunk_parts(len(pictures))
    missing = [number for number in range(len(parts)) if not chunk_paths(folder, number)[1].exists()]
    raise_everywhere("")  # all have looked before any writes
    if missing:
        log.info("computing the features of %d samples, once, to %s", len(pictures), folder)
    error = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = missing[group_rank() :: group_size()]
        slices = [parts[n][start : start + batch_size] for n in own for start in range(0, len(parts[n]), batch_size)]
        batches = iter(make_loader(pictures, slices, num_workers) if slices else ())
        for number in own:
            features, labels, bad = [], [], []
            while len(labels) < len(parts[number]):
                batch = next(batches)
                beat()
                if batch["error"]:
                    raise DataError(batch["error"])
                with autocast():
                    features.append(image_features(batch["image"].to(device)).float().cpu().numpy())
                labels += batch["label"].tolist()
                bad += batch["bad"]
            write_chunk(folder, number, np.concatenate(features), labels, bad)
    except DataError as failed:
        error = str(failed)
    except OSError as failed:
        error = f"features cannot be written to {folder}: {failed.strerror or failed}"
    raise_everywhere(error)
