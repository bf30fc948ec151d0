"""Texts and pictures that are asked for, to vectors: by the model that the embeddings are of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from clip_train.data.decoding import UnusableImage
from clip_train.data.preprocessing import preprocess
from clip_train.embedding.embed import describe_weights
from clip_train.embedding.folder import EmbeddingFolder
from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.loaded_model import LoadedModel, load_model
from clip_train.interop.joining import WeightSource
from clip_train.interop.model_source import open_model


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
        known = dict(folder.manifest.weights) if folder.manifest else None
        if known is None and weights is None:
            raise ConfigError(f"embeddings={folder.path} does not say of which model: give weights= (and model=)")
        of_folder = known if known and weights is None else {"weights": weights, "ema": known and known["ema"]}
        source = WeightSource(str(of_folder["weights"]), ema=bool(of_folder["ema"]), base=of_folder.get("base"))
        opened = open_model(source, model or (known and known["model"]) or None)
        if known and describe_weights(opened, {})["sha256"] != known["sha256"]:
            raise ConfigError(f"weights={source.weights} are not those of embeddings={folder.path}")
        return cls(load_model(opened, device, precision="32", compile=False, batch_size=64, num_workers=0))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "texts embed"]:
        """Unit vectors."""
        ids = torch.from_numpy(self.loaded.tokenizer(texts))
        parts = [self.loaded.model.encode_text(part.to(self.loaded.device)) for part in ids.split(64)]
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
