"""What a linear probe begins with: its head's start, and the features that it learns from."""

from pathlib import Path
from typing import cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from clip_train.data.feature_batches import FeatureBatches
from clip_train.evaluation.feature_cache import compute_features
from clip_train.evaluation.zero_shot import class_embeddings
from clip_train.models.linear_probe import LinearProbe
from clip_train.training.data_module import ClipDataModule
from clip_train.training.fsdp import whole_weights
from clip_train.training.module import ClipModule


class ProbeStart(Callback):
    """Before the first step of a linear probe: its head's start, and the features that it learns from.

    Args:
        data: told to serve features in place of pictures.
        folder: where the features are kept, theirs alone, shared by all ranks.
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
                tokenizer, classes = pictures.tokenizer, probe.classes
                with precision.forward_context():
                    names = class_embeddings(probe.encode_text, classes, tokenizer, batch_size=self.batch_size)
                probe.start_from_names(names)
            table = compute_features(
                probe.image_features,
                pictures,
                self.folder,
                batch_size=self.batch_size,
                num_workers=self.data.num_workers,
                autocast=precision.forward_context,
                device=pl_module.device,
            )
        self.data.serve_features(FeatureBatches(table, self.data.batches))
