"""`clip-eval task=moderation`: thresholds per category from one labelled set, what they give on another."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from jaxtyping import Bool, Float
from omegaconf import DictConfig
from torch import Tensor

from clip_train.data.files import write_atomic
from clip_train.distributed import agreed, group_rank
from clip_train.errors import ConfigError
from clip_train.evaluation.frozen_features import Samples, open_probe
from clip_train.evaluation.loaded_model import LoadedModel
from clip_train.evaluation.moderation import Threshold, calibrate_thresholds, moderation_report
from clip_train.evaluation.results import Results, writing_into
from clip_train.evaluation.zero_shot import class_embeddings
from clip_train.typed_config import typed


@dataclass(frozen=True)
class ModerationOptions:
    """What a threshold is to do.

    Attributes:
        min_precision: the precision to reach with the best recall; None for the best F1.
    """

    min_precision: float | None

    def __post_init__(self) -> None:
        if self.min_precision is not None and not 0 < self.min_precision <= 1:
            raise ConfigError(f"task.min_precision={self.min_precision} is not above 0 and at most 1")


def moderation(loaded: LoadedModel, cfg: DictConfig) -> Results:
    """Flag images by categories of prompts. The metrics are means over the categories, with a variant for each.

    The mean precision is over the categories that flag anything, the mean recall over those that images belong to, of
    F1 over both; `flagging` is how many there are of the first.

    Written into `cfg.output`: `thresholds.json`, with what they gave on the images they were calibrated on.

    Raises:
        ConfigError: a value cannot be used.
        DataError: a set cannot be read.
    """
    options = typed(ModerationOptions, cfg.task, "task")
    if cfg.task.features != "embedding":
        raise ConfigError(f"task.features={cfg.task.features}: prompts are compared with features=embedding")
    probe = open_probe(loaded, cfg)
    with loaded.autocast():
        prompts = class_embeddings(
            loaded.model.encode_text,
            probe.classes,
            loaded.tokenizer,
            batch_size=loaded.batch_size,
        ).cpu()
    with agreed():
        thresholds = calibrate_thresholds(*_scored(probe.train, prompts), options.min_precision)
        found = moderation_report(*_scored(probe.test, prompts), [threshold.value for threshold in thresholds])
    if group_rank() == 0:
        content = {name: _finite(threshold) for name, threshold in zip(probe.classes.names, thresholds)}
        with writing_into(Path(str(cfg.output))) as folder:
            write_atomic(folder / "thresholds.json", json.dumps(content, indent=2).encode())
    variants = {name: _finite(of_category) for name, of_category in zip(probe.classes.names, found)}
    metrics = {
        key: fmean(values)
        for key in ("precision", "recall", "f1")
        if (values := [row[key] for row in variants.values() if key in row])
    }
    metrics["flagging"] = sum("precision" in row for row in variants.values())
    return Results(probe.name, "moderation", metrics, variants)


def _scored(
    samples: Samples, prompts: Float[Tensor, "categories embed"]
) -> tuple[Float[Tensor, "images categories"], Bool[Tensor, "images categories"]]:
    """Cosines to the categories, and which of them an image is of."""
    features, labels = samples.take(slice(None), torch.device("cpu"))
    return features @ prompts.T, labels[:, None] == torch.arange(len(prompts))


def _finite(threshold: Threshold) -> dict[str, float]:
    """What there is a number for."""
    found = {"threshold": threshold.value, **{k: v for k, v in threshold._asdict().items() if k != "value"}}
    return {key: value for key, value in found.items() if math.isfinite(value)}
