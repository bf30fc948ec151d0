import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, precision_score, recall_score

from clip_train.evaluation.captioned_set import encode_texts
from clip_train.evaluation.moderation import calibrate_thresholds, flag_images, moderation_report
from clip_train.evaluation.ranking import order_captions, rank_captions
from tests.evaluation.test_set_tasks import cached, load, run
from tests.evaluation.test_set_tasks import labelled as labelled
from tests.labelled import CLASSES, TEMPLATES


def images(count: int = 60, categories: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    belongs = torch.rand(count, categories, generator=generator) < 0.3
    scores = 0.1 * torch.randn(count, categories, generator=generator) + 0.15 * belongs
    return scores.mul(50).round() / 50, belongs  # with equal scores


def test_the_threshold_with_the_best_f1():
    scores, belongs = images()
    for column, found in enumerate(calibrate_thresholds(scores, belongs)):
        truth, score = belongs[:, column].numpy(), scores[:, column].double().numpy()
        best = max(f1_score(truth, score >= value) for value in np.unique(score))
        assert found.f1 == pytest.approx(best)
        flagged = score >= found.value
        assert found.precision == pytest.approx(precision_score(truth, flagged))
        assert found.recall == pytest.approx(recall_score(truth, flagged))
        assert not (np.abs(score - found.value) < 1e-6).any()


def test_the_threshold_of_a_given_precision_has_the_best_recall():
    scores, belongs = images()
    for column, found in enumerate(calibrate_thresholds(scores, belongs, min_precision=0.7)):
        truth, score = belongs[:, column].numpy(), scores[:, column].double().numpy()
        reaching = [v for v in np.unique(score) if precision_score(truth, score >= v) >= 0.7]
        assert found.precision >= 0.7
        assert found.recall == pytest.approx(max(recall_score(truth, score >= value) for value in reaching))


def test_a_category_that_cannot_reach_it_flags_nothing():
    scores, belongs = torch.tensor([[0.9], [0.1]]), torch.tensor([[False], [True]])
    (found,) = calibrate_thresholds(scores, belongs, min_precision=0.6)
    assert found.value == math.inf and found.recall == 0 and math.isnan(found.precision)
    assert not flag_images(scores, [found.value]).any()
    (without,) = calibrate_thresholds(scores, torch.zeros_like(belongs))
    assert without.value == math.inf and math.isnan(without.recall)


def test_the_report_on_other_images():
    scores, belongs = images()
    values = [threshold.value for threshold in calibrate_thresholds(scores, belongs)]
    assert moderation_report(scores, belongs, values) == calibrate_thresholds(scores, belongs)
    first = moderation_report(scores[:20], belongs[:20], values)[0]
    truth, flagged = belongs[:20, 0].numpy(), scores[:20, 0].double().numpy() >= values[0]
    assert (first.precision, first.recall) == (precision_score(truth, flagged), recall_score(truth, flagged))


def test_the_task(labelled):
    results = run(labelled, "moderation", f"data.path={labelled}/set", "task.min_precision=0.3")
    thresholds = json.loads((labelled / "out" / "thresholds.json").read_text())
    assert list(results.variants) == list(thresholds) == list(CLASSES)
    features, labels = cached(labelled)[33]
    texts = encode_texts(load(), [template.format(name) for name in CLASSES for template in TEMPLATES])
    prompts = torch.nn.functional.normalize(texts.view(len(CLASSES), len(TEMPLATES), -1).mean(1), dim=-1)
    found: dict[str, list[float]] = {"precision": [], "recall": [], "f1": []}
    for label, name in enumerate(CLASSES):
        flagged = features @ prompts[label].numpy() >= thresholds[name].get("threshold", math.inf)
        truth, of_category = labels == label, results.variants[name]
        assert ("precision" in of_category) == flagged.any()
        for key, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
            if key in of_category:
                found[key].append(score(truth, flagged))
                assert of_category[key] == pytest.approx(found[key][-1])
    assert 0 < len(found["precision"]) < len(found["recall"]) == 7  # else the test would not show what a mean is over
    assert results.metrics == pytest.approx(
        {**{key: np.mean(values) for key, values in found.items()}, "flagging": len(found["precision"])}
    )


def test_captions_are_ranked(tmp_path):
    loaded = load()
    paths = [tmp_path / f"{color}.png" for color in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (40, 30), path.stem).save(path)
    captions = ["a cat", "a very long caption " * 9, "two dogs", "a cat"]
    ranked = rank_captions(loaded, paths, captions)
    texts = encode_texts(loaded, captions)
    for row in ranked:
        assert sorted(entry.caption for entry in row) == sorted(set(captions))
        assert [entry.cosine for entry in row] == sorted((entry.cosine for entry in row), reverse=True)
        assert sum(entry.probability for entry in row) == pytest.approx(1)
    assert texts.shape[0] == 4 and ranked[0] != ranked[1]


def test_of_equally_good_captions_the_first_are_kept():
    generator = np.random.default_rng(0)
    images, texts = (torch.tensor(generator.integers(-1, 2, (count, 2))).float() for count in (5, 30))
    names = [str(number) for number in range(30)]
    scores = (images @ texts.T).numpy()
    shares = np.exp(2 * scores) / np.exp(2 * scores).sum(1, keepdims=True)
    for top in (1, 7, 29, 30, None, 99):
        found = order_captions(images, texts, names, torch.tensor(2.0), top)
        for image, row in enumerate(found):
            order = np.argsort(-scores[image], kind="stable")[:top]
            assert [entry.caption for entry in row] == [names[n] for n in order]
            assert [entry.cosine for entry in row] == scores[image, order].tolist()
            assert [entry.probability for entry in row] == pytest.approx(shares[image, order].tolist(), abs=1e-6)
