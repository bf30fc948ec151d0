"""The ways to fine-tune a model: which of its weights learn, and which are added."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from clip_train.errors import ConfigError
from clip_train.models.classifiers import Task, linear_probe, prompt_learner
from clip_train.models.feature_adapter import FeatureAdapter
from clip_train.models.locking import freeze_logits, hold_still, lock_tower
from clip_train.models.lora import add_lora, merge_lora

Settings = Mapping[str, Any]

_TOWERS = {"image": "vision", "text": "text"}


@dataclass(frozen=True)
class Method:
    """A way to fine-tune that `finetune.method` can choose.

    Attributes:
        adapt: changes a model by the `finetune` group, and returns what is to be trained: the model, or one around it.
        adapter_only: whether the base's weights are all frozen, so that checkpoints hold only what was added.
        merge: puts what was added into the base's weights, as far as that can be done.
        classifies: it learns from labels; `adapt` takes the task, too.
    """

    adapt: Callable[..., nn.Module]
    adapter_only: bool = False
    merge: Callable[[nn.Module], None] = lambda model: None
    classifies: bool = False


def adapt(model: Any, settings: Settings, task: Task | None = None) -> Any:
    """A model, with its base's weights in place, made ready for fine-tuning.

    Args:
        model: with the towers `vision` and `text`; it is changed.
        settings: the `finetune` group.
        task: for a method that `classifies`.

    Raises:
        ConfigError: there is no such method, or it refuses its settings.
    """
    method = method_of(settings)
    if method.classifies and task is None:
        raise ConfigError(
            f"finetune={settings['method']} learned to tell its classes, which is not part of a model of images and"
            " texts: take the weights of its base"
        )
    adapted = method.adapt(model, settings, task) if method.classifies else method.adapt(model, settings)
    if not settings.get("train_logit_scale", True):
        freeze_logits(model)
    hold_still(adapted, settings.get("freeze_bn_stats", True))
    return adapted


def classifies(settings: Settings | None) -> bool:
    """Whether a `finetune` group learns from labels. Raises ConfigError if there is no such method."""
    if settings is None:
        return False
    return method_of(settings).classifies or bool(settings.get("classify"))


def method_of(settings: Settings) -> Method:
    """Raises ConfigError if there is no such method."""
    name = settings.get("method")
    if name not in METHODS:
        raise ConfigError(f"finetune.method={name} is none of {', '.join(METHODS)}")
    return METHODS[name]


def tower_of(side: Any, key: str) -> str:
    """The name of the module that encodes images or texts. Raises ConfigError for another side, naming the key."""
    if side not in _TOWERS:
        raise ConfigError(f"{key}={side} is none of {', '.join(_TOWERS)}")
    return _TOWERS[side]


def _full(model: nn.Module, settings: Settings) -> nn.Module:
    return model


def _lit(model: nn.Module, settings: Settings) -> nn.Module:
    tower = tower_of(settings["lock"], "finetune.lock")
    lock_tower(model.get_submodule(tower), settings["unlocked_groups"])
    return model


def _lora(model: nn.Module, settings: Settings) -> nn.Module:
    model.requires_grad_(False)
    for side, tower in _chosen(settings["towers"]):
        add_lora(
            model.get_submodule(tower),
            target_modules=settings["target_modules"][side],
            **{key: settings[key] for key in ("rank", "alpha", "dropout", "use_dora")},
        )
    return _with_logits(model)


def _adapter(model: Any, settings: Settings) -> nn.Module:
    model.requires_grad_(False)
    for side, _ in _chosen(settings["towers"]):
        adapter = FeatureAdapter(model.embed_dim, settings["ratio"], settings["reduction"])
        setattr(model, f"{side}_adapter", adapter)
    return _with_logits(model)


def _with_logits(model: nn.Module) -> nn.Module:
    for parameter in model.parameters(recurse=False):
        parameter.requires_grad_(True)
    return model


def _chosen(towers: Any) -> list[tuple[str, str]]:
    sides = [towers] if isinstance(towers, str) else list(towers or ())
    if not sides:
        raise ConfigError(f"finetune.towers={towers}: give image, text or both")
    return [(side, tower_of(side, "finetune.towers")) for side in sides]


METHODS = {
    "full": Method(_full),
    "lit": Method(_lit),
    "lora": Method(_lora, adapter_only=True, merge=merge_lora),
    "adapter": Method(_adapter, adapter_only=True),
    "linear_probe": Method(linear_probe, adapter_only=True, classifies=True),
    "prompt": Method(prompt_learner, adapter_only=True, classifies=True),
}
