from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clip_train.data.class_names import read_class_names
from clip_train.data.eval_batches import EvalBatches
from clip_train.data.index import load_indexes
from clip_train.data.pairs import PairReader
from clip_train.data.shards import expand_shards
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.errors import DataError
from clip_train.evaluation.classification import Classify, classification_metrics, classify_set
from clip_train.evaluation.zero_shot import class_embeddings, evaluating, make_classifier
from clip_train.models import create_dual_encoder
from tests.labelled import CLASSES, TEMPLATES, make_labelled
from tests.models.test_dual_encoder import TINY
from tests.ranks import run_on_ranks


def labelled_set(pattern: str) -> EvalBatches:
    shards = load_indexes(expand_shards(pattern, "x"))
    reader = PairReader(shards, "png", "cls", classes=read_class_names(None, shards[0].shard))
    return EvalBatches(reader, ClipTokenizer(16), 32, with_labels=True)


def tiny_model():
    torch.manual_seed(3)
    return create_dual_encoder(**TINY).eval()


def measured(classify: Classify, batches: EvalBatches, batch_size: int) -> dict[str, float]:
    options = {"batch_size": batch_size, "num_workers": 0, "autocast": nullcontext(), "device": torch.device("cpu")}
    return classification_metrics(classify_set(classify, batches, **options), len(CLASSES))


def evaluate(pattern: str, batch_size: int = 4) -> dict[str, float] | str:
    model, batches = tiny_model(), labelled_set(pattern)
    try:
        return measured(make_classifier(model, batches, batch_size), batches, batch_size)
    except DataError as error:
        return str(error)


def by_the_book(pattern: str) -> tuple[dict[str, float], torch.Tensor]:
    """open_clip's arithmetic, in float64 on the model's outputs: (metrics, class embeddings)."""
    model, batches = tiny_model(), labelled_set(pattern)
    batch: Any = batches[range(len(batches))]
    columns = []
    with torch.no_grad():
        for name in CLASSES:
            ids = batches.tokenizer([template.replace("{}", name) for template in TEMPLATES])
            texts = F.normalize(model.text(torch.from_numpy(ids)).double(), dim=-1)
            mean = texts.mean(dim=0)
            columns.append(mean / mean.norm())
        pixels = (batch["image"].double() - model.image_mean) / model.image_std
        images = F.normalize(model.vision(pixels.float()).double(), dim=-1)
    weights = torch.stack(columns, dim=1)
    order = np.argsort(-(images @ weights).numpy(), axis=1)
    labels = batch["label"].numpy()
    hits = order == labels[:, None]
    recalls = [hits[labels == label, 0].mean() for label in np.unique(labels)]
    metrics = {"top1": hits[:, 0].mean(), "top5": hits[:, :5].sum(1).mean(), "mean_per_class_recall": np.mean(recalls)}
    return metrics, weights.T


@pytest.fixture
def pattern(tmp_path) -> str:
    """25 pictures: an odd count, classes of different sizes."""
    return make_labelled(tmp_path / "set", [9, 16])


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_equals_open_clips_arithmetic_in_float64(pattern, batch_size):
    expected, weights = by_the_book(pattern)
    assert 0 < expected["top1"] < expected["top5"] < 1
    assert evaluate(pattern, batch_size) == pytest.approx(expected)
    model, batches = tiny_model(), labelled_set(pattern)
    (classes,) = batches.reader.classes
    assert classes is not None
    found = class_embeddings(model.encode_text, classes, batches.tokenizer, batch_size=batch_size)
    assert torch.allclose(found.double(), weights, atol=1e-6)


@pytest.mark.parametrize(("ranks", "counts"), [(2, [9, 16]), (3, [2])])
def test_the_same_on_any_number_of_ranks(tmp_path, ranks, counts):
    pattern = make_labelled(tmp_path / "set", counts)
    expected = evaluate(pattern)
    assert isinstance(expected, dict)
    for metrics in run_on_ranks(evaluate, ranks, pattern):
        assert metrics == pytest.approx(expected)


def test_more_ranks_than_classes(tmp_path):
    pattern = make_labelled(tmp_path / "set", [5], num_classes=2)
    expected = evaluate(pattern)
    assert isinstance(expected, dict) and expected["top5"] == 1
    assert run_on_ranks(evaluate, 3, pattern) == [pytest.approx(expected)] * 3


def test_a_class_without_pictures_does_not_count(tmp_path):
    pattern = make_labelled(tmp_path / "set", [3])  # of 7 classes
    metrics = evaluate(pattern)
    assert isinstance(metrics, dict) and metrics["mean_per_class_recall"] == pytest.approx(metrics["top1"])


@pytest.mark.parametrize("score", [0.0, float("nan")])
def test_equal_scores_go_to_the_first_class_and_none_to_nobody(pattern, score):
    metrics = measured(lambda pixels: torch.full((len(pixels), 7), score), labelled_set(pattern), 4)
    assert metrics["top1"] == (4 / 25 if score == 0 else 0)  # there are 4 of the first class
    assert metrics["mean_per_class_recall"] == (pytest.approx(1 / 7) if score == 0 else 0)


def test_a_bad_label_on_one_rank_is_an_error_on_all(tmp_path):
    pattern = make_labelled(
        tmp_path / "set", [9], lambda sample: sample | ({"cls": "x"} if sample["__key__"] == "000008" else {})
    )
    for error in run_on_ranks(evaluate, 2, pattern):
        assert "00000.tar[8] cannot be used: the label 'x' is not a whole number" in error


def test_the_model_goes_on_training():
    model = tiny_model().train()
    with evaluating(model):
        assert not model.training
    assert model.training
