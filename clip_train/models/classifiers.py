"""The ways to fine-tune that learn to classify: what they train, from the settings and the classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clip_train.data.class_names import ClassNames
from clip_train.data.tokenizer_choice import CaptionTokenizer
from clip_train.models.dual_encoder import DualEncoder
from clip_train.models.linear_probe import LinearProbe
from clip_train.models.prompt_learner import PromptLearner


@dataclass(frozen=True)
class Task:
    """The classes of the training set, and how their names become tokens."""

    classes: ClassNames
    tokenizer: CaptionTokenizer


def linear_probe(model: DualEncoder, settings: Mapping[str, Any], task: Task) -> LinearProbe:
    """Raises ConfigError as `LinearProbe` does."""
    return LinearProbe(model, task.classes, settings["features"], settings["head"])


def prompt_learner(model: DualEncoder, settings: Mapping[str, Any], task: Task) -> PromptLearner:
    """Raises ConfigError as `PromptLearner` does."""
    chosen = {key: settings[key] for key in ("n_ctx", "csc", "init", "conditional")}
    return PromptLearner(model, task.classes, task.tokenizer, **chosen)
