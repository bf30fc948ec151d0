import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from clip_train.errors import ConfigError
from clip_train.evaluation.features import Features
from clip_train.evaluation.retrieval import METRICS, retrieval_metrics
from clip_train.training.validation import Validation, check_best_metric


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
    class Pairs:
        def __len__(self) -> int:
            return 2

        def picture_and_caption(self, index: int):
            return torch.zeros(8, 8, 3, dtype=torch.uint8).numpy(), "a caption"

    settings = {"every_samples": None, "batch_size": 1, "num_workers": 0, "metrics": cast(Any, None), "after": []}
    validation = Validation({}, {}, picture=tmp_path / "gone" / "retrieval.png", **settings)
    trainer, pairs = cast(Any, SimpleNamespace(is_global_zero=True)), cast(Any, Pairs())
    with caplog.at_level(logging.ERROR):
        validation._draw(trainer, "title", pairs, Features(torch.eye(2), torch.eye(2)))
    assert "COULD NOT DRAW" in caplog.text and "No such file" in caplog.text
