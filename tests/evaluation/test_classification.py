import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clip_train.data.known_classes import known_classes, known_templates
from clip_train.errors import ConfigError
from clip_train.evaluation.calibration import calibrate
from clip_train.evaluation.classification import Predictions, class_counts, classification_metrics, confusion_matrix
from clip_train.evaluation.classification_pictures import draw_calibration, draw_confusion
from clip_train.evaluation.corruptions import Corruptions, blur, compress, resize
from clip_train.evaluation.zero_shot import make_probability_classifier
from tests.evaluation.test_zero_shot import labelled_set, tiny_model
from tests.labelled import CLASSES, TEMPLATES, make_labelled

SAID = Predictions(  # four of class 0, two of class 1, none of class 2
    label=torch.tensor([0, 0, 0, 0, 1, 1]),
    predicted=torch.tensor([0, 0, 1, 2, 1, 0]),
    rank=torch.tensor([0, 0, 1, 2, 0, 5]),
    confidence=torch.tensor([0.9, 0.85, 0.55, 1.0, 0.34, 0.35]),
)


def test_metrics_and_confusion_by_hand():
    metrics = classification_metrics(SAID, 3)
    assert metrics == pytest.approx({"top1": 3 / 6, "top5": 5 / 6, "mean_per_class_recall": (2 / 4 + 1 / 2) / 2})
    assert confusion_matrix(SAID, 3).tolist() == [[2, 1, 1], [1, 1, 0], [0, 0, 0]]
    there_are, among = class_counts(SAID, 3, top=2)
    assert (there_are.tolist(), among.tolist()) == ([4, 2, 0], [3, 1, 0])


def test_calibration_error_by_hand():
    found = calibrate(SAID.confidence, SAID.rank == 0, num_bins=5)
    assert found.count.tolist() == [0, 2, 1, 0, 3]
    gaps = [abs(0.345 - 0.5), abs(0.55 - 0), abs((0.9 + 0.85 + 1) / 3 - 2 / 3)]
    assert found.ece == pytest.approx((2 * gaps[0] + gaps[1] + 3 * gaps[2]) / 6, abs=1e-6)
    edges = torch.tensor([0.0, 1 / 15, 1.0], dtype=torch.float64)
    assert calibrate(edges, edges > 2).count.tolist() == [2, *[0] * 13, 1]


def test_pictures_are_drawn(tmp_path):
    title = "cost: $1 or $2"
    draw_confusion(tmp_path / "a.png", confusion_matrix(SAID, 3).numpy(), ("a", "$b$", "c"), title)
    draw_confusion(tmp_path / "b.png", np.eye(120, dtype=np.int64), [str(n) for n in range(120)], title)
    draw_calibration(tmp_path / "c.png", calibrate(SAID.confidence, SAID.rank == 0), title)
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in "abc")


def test_probabilities_are_the_mean_over_the_templates(tmp_path):
    model, batches = tiny_model(), labelled_set(make_labelled(tmp_path / "set", [9]))
    pixels = torch.from_numpy(np.asarray(batches[range(9)]["image"]))
    expected = torch.zeros(9, len(CLASSES))
    with torch.no_grad():
        images = model.encode_image(pixels)
        for template in TEMPLATES:
            ids = batches.tokenizer([template.replace("{}", name) for name in CLASSES])
            texts = F.normalize(model.text(torch.from_numpy(ids)), dim=-1)
            expected += F.softmax(model.logit_scale.exp() * images @ texts.T, dim=1) / len(TEMPLATES)
        found = make_probability_classifier(model, batches, 4)(pixels)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found.sum(1), torch.ones(9))


def test_known_names_and_templates():
    imagenet = known_classes("imagenet")
    assert imagenet == known_classes("imagenet1k")
    assert (len(imagenet), imagenet.captions_per_class, len(known_templates("cifar10"))) == (1000, 80, 18)
    assert imagenet.captions(0)[0] == "a bad photo of a tench."
    assert known_classes("caltech101_vtab").templates == ("a photo of a {}.",)  # it has none of its own
    with pytest.raises(ConfigError, match=r"task\.classnames=cifar10: clip-benchmark has those of .*imagenet1k"):
        known_classes("cifar10")
    with pytest.raises(ConfigError, match=r"task\.templates=nothing: clip-benchmark has those of .*cifar10"):
        known_templates("nothing")
    with pytest.raises(ConfigError, match=r"task\.language=xx"):
        known_classes("imagenet", "xx")


@pytest.mark.parametrize(("change", "mild", "strong"), [(resize, 0.5, 0.1), (compress, 80, 5), (blur, 2.0, 8.0)])
def test_a_stronger_corruption_changes_more(change, mild, strong):
    noise = np.random.default_rng(0).normal(128, 40, (64, 64, 3))
    pixels = np.clip(noise, 0, 255).astype(np.uint8)

    def changed(strength: float) -> float:
        found = change(pixels, strength)
        assert (found.shape, found.dtype) == (pixels.shape, pixels.dtype)
        return float(np.abs(found.astype(int) - pixels).mean())

    assert 1 < changed(mild) < changed(strong)


def test_corruptions_out_of_range_are_refused():
    for resize_to, quality, sigma in (([1.0], [], []), ([], [0], []), ([], [], [-1.0]), ([], [], [])):
        with pytest.raises(ConfigError, match=r"task\."):
            Corruptions(resize_to, quality, sigma)
    assert list(Corruptions([0.25], [50], [1.0]).named()) == ["resize=0.25", "jpeg_quality=50", "gaussian_blur=1"]
