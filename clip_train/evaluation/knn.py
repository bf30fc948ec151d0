"""Weighted k-nearest-neighbour classification of features, as DINO evaluates them."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from clip_train.heartbeat import beat

_QUERIES, _BANK = 1024, 16384


@torch.no_grad()
def knn_scores(
    queries: Float[Tensor, "n width"],
    bank: Float[Tensor, "m width"],
    labels: Int64[Tensor, " m"],
    num_classes: int,
    k: Sequence[int],
    temperature: float = 0.07,
) -> Iterator[dict[int, Float[Tensor, "tile classes"]]]:
    """Each neighbour votes for its class with exp(cosine / temperature) (Wu et al., 2018; Caron et al., 2021).

    Nothing n x m is held.

    Args:
        queries: features to classify.
        bank: features of labelled samples.
        k: how many neighbours vote; of each, the scores are found.

    Yields:
        For every 1024 queries and for each k, the share of the votes of each class; 0 is no vote.
    """
    queries, bank = F.normalize(queries, dim=-1), F.normalize(bank, dim=-1)
    for start in range(0, len(queries), _QUERIES):
        cosines, neighbours = _nearest(queries[start : start + _QUERIES], bank, min(max(k), len(bank)))
        votes = torch.exp((cosines - cosines[:, :1]) / temperature)
        scores = {}
        for count in k:
            found = votes.new_zeros(len(votes), num_classes)
            found.scatter_add_(1, labels[neighbours[:, :count]], votes[:, :count])
            scores[count] = found / found.sum(dim=1, keepdim=True)
        yield scores


def _nearest(queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines of the nearest of the bank, the nearest first, and which they are."""
    cosines = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), _BANK):
        beat()
        tile = queries @ bank[start : start + _BANK].T
        near, where = tile.topk(min(count, tile.shape[1]), dim=1)
        cosines, places = torch.cat([cosines, near], dim=1), torch.cat([places, where + start], dim=1)
        cosines, order = cosines.topk(min(count, cosines.shape[1]), dim=1)
        places = places.gather(1, order)
    return cosines, places


def rank_by_votes(shares: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """For each query, how many classes come before its own; all of them, if that has no vote at all.

    Of classes with equal votes the first comes first.
    """
    own = shares.gather(1, labels[:, None])
    column = torch.arange(shares.shape[1], device=shares.device)
    before = (shares > own) | ((shares == own) & (column < labels[:, None]))
    return before.sum(dim=1).where(own[:, 0] > 0, shares.shape[1])
