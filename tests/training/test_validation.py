import logging
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from clip_train.errors import ConfigError
from clip_train.evaluation.classification_pictures import draw_confusion
from clip_train.evaluation.features import Features
from clip_train.evaluation.retrieval import METRICS, retrieval_metrics
from clip_train.training.callbacks.validation import Validation, check_best_metric


def test_the_metrics_that_are_said_to_be_there_are():
    features = Features(torch.eye(4), torch.eye(4))
    assert sorted(retrieval_metrics(features, 1.0)) == sorted(METRICS)


def test_a_misspelt_best_metric_is_refused():
    check_best_metric(None, [])
    check_best_metric("val/coco/image_to_text_recall@1", ["flickr", "coco"])
    with pytest.raises(ConfigError, match=r"best_metric=val/coco/recall@1: no such metric; there are val/coco/loss, "):
        check_best_metric("val/coco/recall@1", ["coco"])
    with pytest.raises(ConfigError, match="there is no validation set"):
        check_best_metric("val/coco/loss", [])


def test_a_picture_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    settings = {"every_samples": None, "batch_size": 1, "num_workers": 0, "metrics": cast(Any, None), "after": []}
    validation = Validation({}, {}, pictures=tmp_path / "gone", **settings)
    trainer = cast(Any, SimpleNamespace(is_global_zero=True))
    with caplog.at_level(logging.ERROR):
        validation._draw(
            trainer, "confusion_pets.png", lambda path: draw_confusion(path, np.eye(2), ("cat", "dog"), "")
        )
    assert "COULD NOT DRAW" in caplog.text and "No such file" in caplog.text
