import pytest

from clip_train.errors import ConfigError
from clip_train.sweeps.objective import Objective

METRICS = {
    "train/loss": 2.0,
    "val/coco/loss": 1.0,
    "val/coco/image_to_text_recall@1": 0.2,
    "val/coco/text_to_image_recall@1": 0.4,
    "val/other/image_to_text_recall@1": 0.9,
    "val/other/text_to_image_recall@1": 0.9,
}


@pytest.mark.parametrize(
    ("metric", "has_validation", "value", "direction"),
    [
        (None, True, 0.3, "maximize"),
        (None, False, 2.0, "minimize"),
        ("val/coco/loss", True, 1.0, "minimize"),
        (["val/coco/image_to_text_recall@1", "val/other/image_to_text_recall@1"], True, 0.55, "maximize"),
    ],
)
def test_value_and_direction(metric, has_validation, value, direction):
    objective = Objective.of(metric, None, has_validation)
    assert objective.value(METRICS) == pytest.approx(value)
    assert objective.direction == direction


def test_best():
    assert Objective(None, "maximize").best({3: 0.5, 1: 0.5, 2: 0.1}) == 1
    assert Objective(None, "minimize").best({3: 0.5, 2: 0.1}) == 2
    assert Objective(None, "minimize").best({}) is None


def test_names_what_does_not_exist():
    with pytest.raises(ConfigError, match="metric=val/cooc/loss: no such metric; there are train/loss"):
        Objective.of("val/cooc/loss", None, True).value(METRICS)
    with pytest.raises(ConfigError, match="direction=up is none of maximize, minimize"):
        Objective.of(None, "up", True)
