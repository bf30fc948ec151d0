"""Which of some captions suits a picture best."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
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
    """For each picture the candidates, each once, the best first; of equally good ones, the first of the candidates.

    Args:
        pictures: files.
        candidates: captions, the same for all pictures.
        way: what to do with those longer than the context, as for `embed_texts`.

    Raises:
        DataError: a picture cannot be read.
        ConfigError: there is no such way.
    """
    candidates = list(dict.fromkeys(candidates))
    source, texts, ranked = loaded.source, encode_texts(loaded, candidates, way), []
    scale = loaded.model.logit_scale.exp()
    for start in range(0, len(pictures), loaded.batch_size):
        batch = pictures[start : start + loaded.batch_size]
        pixels = [read_picture(path, source.image_size, source.resize_mode, source.interpolation) for path in batch]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(loaded.device)
        with loaded.autocast():
            vectors = loaded.model.encode_image(images)
        ranked += order_captions(vectors, texts, candidates, scale)
    return ranked


def order_captions(
    images: Float[Tensor, "images embed"],
    texts: Float[Tensor, "texts embed"],
    captions: Sequence[str],
    scale: Tensor,
    top: int | None = None,
) -> list[list[RankedCaption]]:
    """For each picture the captions, the best first; of equally good ones, the first.

    Args:
        images, texts: unit vectors of the pictures and of the captions.
        captions: no two the same, as equal ones might differ in the last bits of their scores.
        scale: the inverse temperature of the probabilities.
        top: how many are wanted; None is all.
    """
    cosines = images @ texts.T
    places = _best_places(cosines, min(top or len(captions), len(captions)))
    shares = (scale * cosines).softmax(1).gather(1, places).tolist()
    return [
        [RankedCaption(captions[int(n)], cosine, share) for n, cosine, share in zip(numbers, kept, of_all)]
        for numbers, kept, of_all in zip(places.tolist(), cosines.gather(1, places).tolist(), shares)
    ]


def _best_places(scores: Float[Tensor, "images texts"], count: int) -> Int64[Tensor, "images count"]:
    """Where the greatest are, in their order; of equal ones, the first."""
    if count == scores.shape[1]:
        return scores.sort(dim=1, descending=True, stable=True).indices
    last = scores.topk(count, dim=1).values[:, -1:]  # which of equal ones topk takes, it does not say
    above, equal = scores > last, scores == last
    chosen = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    places = chosen.nonzero()[:, 1].view(len(scores), count)
    return places.gather(1, scores.gather(1, places).sort(dim=1, descending=True, stable=True).indices)
