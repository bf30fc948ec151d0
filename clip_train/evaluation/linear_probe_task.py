"""`clip-eval task=linear_probe`: logistic regression on frozen features, by the protocol of the CLIP paper."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor

from clip_train.data.files import write_atomic
from clip_train.distributed import agreed, group_rank, group_size, sum_over_ranks
from clip_train.errors import ConfigError
from clip_train.evaluation.classification import rank_of_label
from clip_train.evaluation.frozen_features import Samples, gather_predictions, judged, open_probe
from clip_train.evaluation.loaded_model import LoadedModel
from clip_train.evaluation.logistic_regression import (
    choose_strength,
    fit_logistic_regression,
    validation_split,
    with_ones,
)
from clip_train.evaluation.results import Results, writing_into
from clip_train.evaluation.zero_shot_task import accuracy
from clip_train.typed_config import typed

_ROWS = 16384  # whose scores are held at a time


@dataclass(frozen=True)
class ProbeOptions:
    """How the linear classifier is regularised.

    Attributes:
        C: how little the weights are held back; None searches.
        validation_share: of each class of the training images, for that search.
        max_iter: of conjugate gradients, of a fit.
    """

    C: float | None
    validation_share: float
    max_iter: int

    def __post_init__(self) -> None:
        if self.C is not None and not self.C > 0:
            raise ConfigError(f"task.C={self.C} is not above 0")
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"task.validation_share={self.validation_share} is not between 0 and 1")
        if self.max_iter < 1:
            raise ConfigError(f"task.max_iter={self.max_iter} is not at least 1")


def linear_probe(loaded: LoadedModel, cfg: DictConfig) -> Results:
    """Learn from one labelled set, say what that gives on another.

    Written into `cfg.output`: `regularisation.json`, the accuracy on held-out training images for each C tried.

    Raises:
        ConfigError: a value cannot be used.
        DataError: a set cannot be read.
    """
    options = typed(ProbeOptions, cfg.task, "task")
    probe = open_probe(loaded, cfg)
    train, metrics, tried = probe.train, {}, {}

    def fit(rows: np.ndarray, C: float) -> Tensor:
        with agreed():
            own = train.take(rows[group_rank() :: group_size()], loaded.device)
        return fit_logistic_regression(*own, probe.num_classes, C, max_iter=options.max_iter)

    C = options.C
    if C is None:
        learned, held_out = validation_split(train.labels, options.validation_share)
        if not len(held_out):
            raise ConfigError(f"task.validation_share={options.validation_share}: that is not one image of any class")
        C, tried = choose_strength(lambda C: _accuracy(train, held_out, fit(learned, C), loaded.device))
        metrics = {"validation_acc1": tried[C]}
    head = fit(np.arange(len(train.labels)), C)
    said = []
    with agreed():
        features, labels = probe.test.take_share(loaded.device)
        for start in range(0, len(labels), _ROWS):
            scores, own = with_ones(features[start : start + _ROWS]) @ head.T, labels[start : start + _ROWS]
            said.append(judged(scores.softmax(1), own, rank_of_label(scores, own)))
    found = accuracy(gather_predictions(said, len(probe.test.labels), loaded.device), probe.num_classes)
    if tried and group_rank() == 0:
        content = [{"C": strength, "validation_acc1": score} for strength, score in tried.items()]
        with writing_into(Path(str(cfg.output))) as folder:
            write_atomic(folder / "regularisation.json", json.dumps(content, indent=2).encode())
    return Results(probe.name, "linear_probe", {**{f"lp_{k}": v for k, v in found.items()}, "C": C, **metrics})


def _accuracy(samples: Samples, rows: np.ndarray, head: Float[Tensor, "classes width"], device: torch.device) -> float:
    """Of some samples, which the ranks share."""
    hits = torch.zeros((), dtype=torch.int64, device=device)
    with agreed():
        features, labels = samples.take(rows[group_rank() :: group_size()], device)
        for start in range(0, len(labels), _ROWS):
            scores = with_ones(features[start : start + _ROWS]) @ head.T
            hits += (rank_of_label(scores, labels[start : start + _ROWS]) == 0).sum()
    return sum_over_ranks(hits).item() / len(rows)
