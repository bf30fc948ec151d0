"""Which of some captions suits a picture best."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clip_train.evaluation.captioned_set import encode_texts
from clip_train.evaluation.captioning import read_picture
from clip_train.evaluation.loaded_model import LoadedModel


class RankedCaption(NamedTuple):
    """A candidate and how well it suits.

    Attributes:
        cosine: of the picture's and the caption's unit vectors.
        probability: softmax over the candidates at the model's temperature.
    """

    caption: str
    cosine: float
    probability: float


@torch.no_grad()
def rank_captions(
    loaded: LoadedModel, pictures: Sequence[Path], candidates: Sequence[str], way: str = "truncate"
) -> list[list[RankedCaption]]:
    """For each picture the candidates, the best first; of equally good ones, the first of the candidates.

    Args:
        pictures: files.
        candidates: captions, the same for all pictures.
        way: what to do with those longer than the context, as for `embed_texts`.

    Raises:
        DataError: a picture cannot be read.
        ConfigError: there is no such way.
    """
    source, texts, ranked = loaded.source, encode_texts(loaded, candidates, way), []
    scale = loaded.model.logit_scale.exp()
    for start in range(0, len(pictures), loaded.batch_size):
        batch = pictures[start : start + loaded.batch_size]
        pixels = [read_picture(path, source.image_size, source.resize_mode, source.interpolation) for path in batch]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(loaded.device)
        with loaded.autocast():
            vectors = loaded.model.encode_image(images)
        ranked += [order_captions(vector, texts, candidates, scale) for vector in vectors]
    return ranked


def order_captions(
    image: Float[Tensor, " embed"], texts: Float[Tensor, "texts embed"], captions: Sequence[str], scale: Tensor
) -> list[RankedCaption]:
    """Captions of a picture, the best first.

    Args:
        image, texts: unit vectors of the picture and of the captions.
        scale: the inverse temperature of the probabilities.
    """
    cosines = texts @ image
    probabilities = (scale * cosines).softmax(0)
    cosines, order = cosines.sort(descending=True, stable=True)
    shares = probabilities[order].tolist()
    return [RankedCaption(captions[int(n)], c, p) for n, c, p in zip(order.tolist(), cosines.tolist(), shares)]
