"""Texts and pictures that are asked for, to vectors: by the model that the embeddings are of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from clip_train.checkpoints.folder import MANIFEST
from clip_train.data.decoding import UnusableImage
from clip_train.data.preprocessing import preprocess
from clip_train.embedding.embed import describe_weights
from clip_train.embedding.folder import EmbeddingFolder
from clip_train.embedding.manifest import Manifest
from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.loaded_model import LoadedModel, load_model
from clip_train.interop.joining import WeightSource
from clip_train.interop.model_source import ModelSource, open_model


@dataclass(frozen=True)
class QueryEncoder:
    """A model as a search asks it."""

    loaded: LoadedModel

    @classmethod
    def open(
        cls, folder: EmbeddingFolder, weights: str | None, model: Mapping[str, Any] | None, device: torch.device
    ) -> "QueryEncoder":
        """The model that a folder's embeddings are of.

        Args:
            weights: where it is now; None for where it was when the embeddings were made.
            model: its config; None for the one that the folder or the weights know.

        Raises:
            ConfigError: it cannot be read, is another model, or nobody knows which it is.
        """
        if folder.manifest is None:
            if weights is None:
                raise ConfigError(f"embeddings={folder.path} does not say of which model: give weights= (and model=)")
            opened = open_model(WeightSource(weights), model)
        else:
            known = folder.manifest.weights
            where = weights or str(known["weights"])
            ema = bool(known["ema"]) and (weights is None or (Path(where) / MANIFEST).exists())  # else: averages alone
            opened = open_model(WeightSource(where, ema=ema, base=known.get("base")), model or known["model"])
            _check_same(opened, folder.manifest, f"embeddings={folder.path}")
        return cls(load_model(opened, device, precision="32", compile=False, batch_size=64, num_workers=0))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "texts embed"]:
        """Unit vectors."""
        ids = torch.from_numpy(self.loaded.tokenizer(texts))
        parts = [self.loaded.model.encode_text(part) for part in ids.split(64)]
        return torch.cat(parts).float().cpu().numpy()

    @torch.no_grad()
    def picture(self, encoded: bytes, name: str) -> Float[np.ndarray, " embed"]:
        """A unit vector.

        Args:
            name: of the picture, for the error.

        Raises:
            DataError: the bytes are no picture.
        """
        source = self.loaded.source
        try:
            pixels = preprocess(encoded, source.image_size, source.resize_mode, source.interpolation)
        except UnusableImage as error:
            raise DataError(f"{name} is no readable picture: {error}") from error
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(self.loaded.device)
        return self.loaded.model.encode_image(image)[0].float().cpu().numpy()


def _check_same(opened: ModelSource, manifest: Manifest, embeddings: str) -> None:
    """Raises ConfigError if embeddings are of other weights, or of the same in another model."""
    described = describe_weights(opened, {})
    if described["sha256"] != manifest.weights["sha256"]:
        raise ConfigError(f"weights={opened.name} are not those of {embeddings}")
    if described["model"] != manifest.weights["model"]:
        raise ConfigError(f"model= is another than that of {embeddings}, which know their own: leave it out")
