"""Recall@K between the images and texts of a set of pairs, without an N x N matrix."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clip_train.distributed import group_rank, group_size, sum_over_ranks
from clip_train.evaluation.features import Features

RECALL_AT = (1, 5, 10)
METRICS = ("loss", *(f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in RECALL_AT))
_TILE_ROWS = 1024


@torch.no_grad()
def retrieval_metrics(features: Features, logit_scale: float, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Recall@K both ways and the contrastive loss of the set taken as one batch.

    Every rank ranks its share of the queries against all candidates, in tiles of 1024 queries: memory grows with N,
    not N x N. Where scores are equal, the candidate that comes first in the set ranks first.

    Args:
        features: all pairs, the same on every rank; image i belongs to text i.
        logit_scale: the inverse temperature of the loss.

    Returns:
        `loss`, `image_to_text_recall@K` and `text_to_image_recall@K`, the same on every rank.
    """
    count = len(features.image)
    first, last = (count * (group_rank() + step) // group_size() for step in (0, 1))
    metrics: dict[str, float] = {"loss": 0.0}
    directions = {
        "image_to_text": (features.image, features.text),
        "text_to_image": (features.text, features.image),
    }
    for name, (queries, candidates) in directions.items():
        sums = torch.zeros(1 + len(recall_at), dtype=torch.float64)
        for start in range(first, last, _TILE_ROWS):
            own = torch.arange(start, min(start + _TILE_ROWS, last), device=queries.device)
            ranks, losses = _rank_own(queries[own] @ candidates.T, own, logit_scale)
            sums[0] += losses.double().sum().item()
            sums[1:] += torch.tensor([(ranks < k).sum().item() for k in recall_at])
        loss_sum, *hits = sum_over_ranks(sums.to(queries.device, _sum_dtype(queries))).tolist()
        metrics["loss"] += loss_sum / count / 2
        metrics.update({f"{name}_recall@{k}": hit / count for k, hit in zip(recall_at, hits)})
    return metrics


def _rank_own(
    scores: Float[Tensor, "queries pairs"], own: Int64[Tensor, " queries"], logit_scale: float
) -> tuple[Int64[Tensor, " queries"], Float[Tensor, " queries"]]:
    """For each query, how many candidates come before its own (column `own`), and its InfoNCE loss."""
    own_score = scores.gather(1, own[:, None])
    column = torch.arange(scores.shape[1], device=scores.device)
    # Said by what comes after, so that a score that is not a number ranks last.
    after = (scores < own_score) | ((scores == own_score) & (column >= own[:, None]))
    losses = torch.logsumexp(logit_scale * scores, dim=1) - logit_scale * own_score[:, 0]
    return (~after).sum(dim=1), losses


def _sum_dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64
