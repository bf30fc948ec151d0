import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clip_train.evaluation import retrieval
from clip_train.evaluation.features import Features
from clip_train.evaluation.retrieval import retrieval_metrics
from clip_train.losses import contrastive_loss
from tests.ranks import run_on_ranks


def random_features(count: int = 57, dim: int = 8) -> Features:
    generator = torch.Generator().manual_seed(count)
    image = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
    noise = torch.randn(count, dim, generator=generator)
    return Features(image, F.normalize(image + 0.4 * noise, dim=1))


def by_sorting(features: Features, k: int) -> tuple[float, float]:
    scores = features.image.numpy() @ features.text.numpy().T
    hits = [
        np.mean([i in np.argsort(-row, kind="stable")[:k] for i, row in enumerate(matrix)])
        for matrix in (scores, scores.T)
    ]
    return float(hits[0]), float(hits[1])


@pytest.mark.parametrize("tile", [1, 10, 1024])
def test_equals_sorting(monkeypatch, tile):
    monkeypatch.setattr(retrieval, "_TILE_ROWS", tile)
    features = random_features()
    metrics = retrieval_metrics(features, 14.0)
    for k in (1, 5, 10):
        found = metrics[f"image_to_text_recall@{k}"], metrics[f"text_to_image_recall@{k}"]
        assert found == pytest.approx(by_sorting(features, k))
    assert 0.2 < metrics["image_to_text_recall@1"] < metrics["image_to_text_recall@5"] < 1
    expected = contrastive_loss(features.image.double(), features.text.double(), torch.tensor(14.0).double())
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_collapsed_model_finds_nothing():
    same = F.normalize(torch.ones(100, 8), dim=1)
    metrics = retrieval_metrics(Features(same, same), 14.0)
    assert metrics["image_to_text_recall@1"] == 0.01
    assert metrics["text_to_image_recall@10"] == 0.1


def test_a_model_that_diverged_finds_nothing():
    nothing = torch.full((20, 8), torch.nan)
    metrics = retrieval_metrics(Features(nothing, nothing), 14.0)
    assert metrics["image_to_text_recall@10"] == metrics["text_to_image_recall@1"] == 0


def test_the_same_on_any_number_of_ranks():
    expected = retrieval_metrics(random_features(), 14.0)
    for metrics in run_on_ranks(retrieval_of_random_features, 4):
        assert metrics == pytest.approx(expected, rel=1e-6)


def retrieval_of_random_features() -> dict[str, float]:
    return retrieval_metrics(random_features(), 14.0)
