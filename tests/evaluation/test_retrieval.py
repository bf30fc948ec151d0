import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clip_train.evaluation import retrieval_ranks as ranks_module
from clip_train.evaluation.features import Features
from clip_train.evaluation.retrieval import captioned_metrics, retrieval_metrics
from clip_train.evaluation.retrieval_ranks import retrieval_ranks
from clip_train.losses import contrastive_loss
from tests.ranks import run_on_ranks

SHAPES = [(3, 10), (512, 2048)]


def random_features(count: int = 57, dim: int = 8) -> Features:
    generator = torch.Generator().manual_seed(count)
    image = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
    noise = torch.randn(count, dim, generator=generator)
    return Features(image, F.normalize(image + 0.4 * noise, dim=1))


def captioned(images: int = 40, most: int = 6, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images with one to `most` captions each, some of which two images share word by word: (image, text, pairs)."""
    generator = torch.Generator().manual_seed(images)
    counts = torch.randint(1, most + 1, (images,), generator=generator)
    owner = torch.arange(images).repeat_interleave(counts)
    image = F.normalize(torch.randn(images, dim, generator=generator), dim=1)
    noise = torch.randn(len(owner), dim, generator=generator)
    text = F.normalize(image[owner] + 0.6 * noise, dim=1)
    text[1::9] = text[0]
    return image, text, torch.stack([owner, torch.arange(len(owner))], dim=1)


def many_to_many() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Twelve texts that several images share, in no order."""
    image, text, _ = captioned(40)
    text = text[:12]
    owners = torch.randint(0, 12, (40,), generator=torch.Generator().manual_seed(0))
    pairs = torch.cat(
        [torch.stack([torch.arange(40), owners], 1), torch.stack([torch.arange(12), torch.arange(12)], 1)]
    )
    return image, text, pairs.unique(dim=0)


def by_sorting(image: torch.Tensor, text: torch.Tensor, pairs: torch.Tensor) -> tuple[list[int], list[int]]:
    """In float64, by the definition: of a stable sort, where the first that belongs to the query stands."""
    scores = image.double().numpy() @ text.double().numpy().T
    belongs = np.zeros(scores.shape, dtype=bool)
    belongs[tuple(pairs.T.numpy())] = True
    return tuple(
        [int(np.argmax(own[np.argsort(-row.round(6), kind="stable")])) for row, own in zip(matrix, positive)]
        for matrix, positive in ((scores, belongs), (scores.T, belongs.T))
    )  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("content", [captioned, many_to_many])
def test_ranks_equal_those_of_sorting(monkeypatch, shape, content):
    monkeypatch.setitem(ranks_module._TILE, "cpu", shape)
    image, text, pairs = content()
    found = retrieval_ranks(image, text, pairs)
    assert (found.image_to_text.tolist(), found.text_to_image.tolist()) == by_sorting(image, text, pairs)
    assert found.image_to_text.max() > 0 and found.text_to_image.max() > 0


def test_metrics_of_captions():
    image, text, pairs = captioned()
    to_text, to_image = map(np.array, by_sorting(image, text, pairs))
    metrics = captioned_metrics(image, text, pairs)
    for name, found in (("text_retrieval", to_text), ("image_retrieval", to_image)):
        for k in (1, 5, 10):
            assert metrics[f"{name}_recall@{k}"] == pytest.approx((found < k).mean())
        assert metrics[f"{name}_median_rank"] == np.floor(np.median(found)) + 1
        assert metrics[f"{name}_mean_rank"] == pytest.approx(found.mean() + 1)
    assert 0.2 < metrics["text_retrieval_recall@1"] < metrics["text_retrieval_recall@5"] < 1


@pytest.mark.parametrize("shape", SHAPES)
def test_metrics_of_pairs(monkeypatch, shape):
    monkeypatch.setitem(ranks_module._TILE, "cpu", shape)
    features = random_features()
    metrics = retrieval_metrics(features, 14.0)
    own = torch.arange(len(features.image))
    captions = captioned_metrics(*features, torch.stack([own, own], dim=1))
    for k in (1, 5, 10):
        assert metrics[f"image_to_text_recall@{k}"] == captions[f"text_retrieval_recall@{k}"]
        assert metrics[f"text_to_image_recall@{k}"] == captions[f"image_retrieval_recall@{k}"]
    assert 0.2 < metrics["image_to_text_recall@1"] < metrics["image_to_text_recall@5"] < 1
    expected = contrastive_loss(features.image.double(), features.text.double(), torch.tensor(14.0).double())
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_collapsed_model_finds_nothing(monkeypatch, shape):
    monkeypatch.setitem(ranks_module._TILE, "cpu", shape)
    same = F.normalize(torch.randn(1, 96).expand(100, 96), dim=1)
    metrics = retrieval_metrics(Features(same, same), 14.0)
    assert metrics["image_to_text_recall@1"] == 0.01
    assert metrics["text_to_image_recall@10"] == 0.1


def test_a_model_that_diverged_finds_nothing():
    nothing = torch.full((20, 8), torch.nan)
    metrics = retrieval_metrics(Features(nothing, nothing), 14.0)
    assert metrics["image_to_text_recall@10"] == metrics["text_to_image_recall@1"] == 0


def test_what_is_not_a_number_counts_against_the_query():
    image, text = torch.eye(3), torch.eye(3)
    text[1] = torch.nan
    pairs = torch.tensor([[0, 0], [0, 1], [1, 1], [2, 2]])
    assert [ranks.tolist() for ranks in retrieval_ranks(image, text, pairs)] == [[1, 3, 1], [0, 3, 0]]


def test_the_same_on_any_number_of_ranks():
    expected = both()
    for found in run_on_ranks(both, 3):
        for (metrics, ranks), (expected_metrics, expected_ranks) in zip(found, expected, strict=True):
            assert metrics == pytest.approx(expected_metrics, rel=1e-5)
            assert ranks == expected_ranks


def both() -> list[tuple[dict[str, float], list[list[int]]]]:
    """Of more and of fewer images than there are ranks, in small tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ranks_module._TILE, "cpu", (7, 10))
        return small_sets()


def small_sets() -> list[tuple[dict[str, float], list[list[int]]]]:
    return [
        (retrieval_metrics(random_features(n), 14.0), [ranks.tolist() for ranks in retrieval_ranks(*captioned(n))])
        for n in (57, 2)
    ]
