"""Recall@K between the images and texts of a set, without a matrix of all scores."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clip_train.distributed import own_part, sum_over_ranks
from clip_train.evaluation.features import Features
from clip_train.evaluation.retrieval_ranks import retrieval_ranks
from clip_train.losses.contrastive import scaled_rows
from clip_train.losses.exchange import maximum_over_ranks_
from clip_train.losses.tiles import LogSums, add_statistics

RECALL_AT = (1, 5, 10)
METRICS = ("loss", *(f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in RECALL_AT))


@torch.no_grad()
def retrieval_metrics(features: Features, logit_scale: float, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Recall@K both ways and the contrastive loss of the set taken as one batch.

    Args:
        features: all pairs, the same on every rank; image i belongs to text i.
        logit_scale: the inverse temperature of the loss.

    Returns:
        `loss`, `image_to_text_recall@K` and `text_to_image_recall@K`, the same on every rank.
    """
    own = torch.arange(len(features.image), device=features.image.device)
    ranks = retrieval_ranks(features.image, features.text, torch.stack([own, own], dim=1))
    metrics = {"loss": _loss(features, logit_scale)}
    for name, found in ranks._asdict().items():
        metrics |= {f"{name}_recall@{k}": _share_below(found, k) for k in recall_at}
    return metrics


def captioned_metrics(
    image: Float[Tensor, "images embed"],
    text: Float[Tensor, "texts embed"],
    pairs: Int64[Tensor, "pairs 2"],
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, float]:
    """Retrieval where an image has several captions, as on Flickr30k and COCO, under clip-benchmark's names.

    An image finds a text if any of its captions is among the first K; each caption looks for its own image.

    Args:
        image, text, pairs: as `retrieval_ranks` takes them.

    Returns:
        `image_retrieval_*` (text to image) and `text_retrieval_*` (image to text), the same on every rank: `recall@K`;
        `median_rank`, counted from 1 and rounded down as is usual; `mean_rank`.
    """
    ranks, metrics = retrieval_ranks(image, text, pairs), {}
    for name, found in (("image_retrieval", ranks.text_to_image), ("text_retrieval", ranks.image_to_text)):
        metrics |= {f"{name}_recall@{k}": _share_below(found, k) for k in recall_at}
        middle = found.sort().values[[(len(found) - 1) // 2, len(found) // 2]].tolist()
        metrics[f"{name}_median_rank"] = float(sum(middle) // 2 + 1)
        metrics[f"{name}_mean_rank"] = found.sum().item() / len(found) + 1
    return metrics


def _share_below(ranks: Int64[Tensor, " queries"], k: int) -> float:
    return (ranks < k).sum().item() / len(ranks)


def _loss(features: Features, logit_scale: float) -> float:
    """InfoNCE of the whole set, whose log-sums the ranks share by images."""
    count = len(features.image)
    part = own_part(count)
    own = slice(part.start, part.stop)
    scale = torch.tensor(logit_scale, device=features.image.device)
    x = scaled_rows(features.image[own], scale, None)
    rows, columns = LogSums.empty(len(x), features.text), LogSums.empty(count, features.text)
    add_statistics(x, features.text, rows, columns)
    maximum = columns.maximum.clone()
    maximum_over_ranks_(maximum, None)
    total = sum_over_ranks(columns.total * torch.exp2(columns.maximum - maximum))
    exact = {"dtype": torch.float32 if columns.total.device.type == "mps" else torch.float64}
    matched = (scale * features.image[own] * features.text[own]).sum(**exact)
    losses = sum_over_ranks(math.log(2) / 2 * rows.log2().sum(**exact) - matched)
    return (losses + math.log(2) / 2 * LogSums(maximum, total).log2().sum(**exact)).item() / count
