"""The ways to fine-tune a model: which of its weights learn, and which are added."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from clip_train.errors import ConfigError
from clip_train.models.classifiers import Task, linear_probe, prompt_learner
from clip_train.models.locking import freeze_logits, hold_still, lock_tower

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune that `finetune.method` can choose.

    Attributes:
        adapt: changes a model by the `finetune` group, and returns what is to be trained: the model, or one around it.
        adapter_only: whether all weights of the base are frozen, so that checkpoints hold only what was added.
        classifies: it learns from labels; `adapt` takes the task, too.
    """

    adapt: Callable[..., nn.Module]
    adapter_only: bool = False
    classifies: bool = False


def adapt(model: nn.Module, settings: Settings, task: Task | None = None) -> nn.Module:
    """A model, with its base's weights in place, made ready for fine-tuning.

    Args:
        model: with the towers `vision` and `text`; it is changed.
        settings: the `finetune` group.
        task: for a method that `classifies`.

    Raises:
        ConfigError: there is no such method, or it refuses its settings.
    """
    method = method_of(settings)
    adapted = method.adapt(model, settings, task) if method.classifies else method.adapt(model, settings)
    hold_still(adapted, settings.get("freeze_bn_stats", True))
    return adapted


def method_of(settings: Settings) -> Method:
    """Raises ConfigError if there is no such method."""
    name = settings.get("method")
    if name not in METHODS:
        raise ConfigError(f"finetune.method={name} is none of {', '.join(METHODS)}")
    return METHODS[name]


def _full(model: nn.Module, settings: Settings) -> nn.Module:
    return model


def _lit(model: nn.Module, settings: Settings) -> nn.Module:
    towers = {"image": "vision", "text": "text"}
    if settings["lock"] not in towers:
        raise ConfigError(f"finetune.lock={settings['lock']} is none of {', '.join(towers)}")
    lock_tower(model.get_submodule(towers[settings["lock"]]), settings["unlocked_groups"])
    if not settings["train_logit_scale"]:
        freeze_logits(model)
    return model


METHODS = {
    "full": Method(_full),
    "lit": Method(_lit),
    "linear_probe": Method(linear_probe, adapter_only=True, classifies=True),
    "prompt": Method(prompt_learner, adapter_only=True, classifies=True),
}
