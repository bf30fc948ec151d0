import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clip_train.evaluation import knn
from clip_train.evaluation.knn import knn_scores, rank_by_votes


def features(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def by_definition(queries, bank, labels, classes, k, temperature) -> np.ndarray:
    cosines = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    shares = np.zeros((len(queries), classes))
    for row, own in zip(shares, cosines.numpy()):
        for neighbour in np.argsort(-own, kind="stable")[:k]:
            row[labels[neighbour]] += np.exp(own[neighbour] / temperature)
    return shares / shares.sum(1, keepdims=True)


@pytest.mark.parametrize("tiles", [(3, 7), (1024, 16384)])
def test_equals_the_definition(monkeypatch, tiles):
    monkeypatch.setattr(knn, "_QUERIES", tiles[0])
    monkeypatch.setattr(knn, "_BANK", tiles[1])
    queries, bank = features(10, 0), features(40, 1)
    labels = torch.arange(40) % 7
    found = list(knn_scores(queries, bank, labels, 9, [1, 5, 100]))
    for k in (1, 5, 100):
        expected = by_definition(queries, bank, labels, 9, k, 0.07)
        assert np.allclose(torch.cat([scores[k] for scores in found]), expected, atol=1e-5)


def test_a_class_without_votes_is_not_among_the_best():
    shares = torch.tensor([[0.5, 0.0, 0.5, 0.0]]).expand(4, 4)
    assert rank_by_votes(shares, torch.arange(4)).tolist() == [0, 4, 1, 4]
