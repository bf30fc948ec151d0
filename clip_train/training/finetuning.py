"""What a run begins with: the weights of `init_from`, and the model adapted as `finetune` says."""

import logging
from typing import Any

from omegaconf import DictConfig
from torch import nn

from clip_train.checkpoints.base import Base
from clip_train.errors import ConfigError
from clip_train.evaluation.zero_shot import set_classes
from clip_train.interop.joining import read_base, read_whole
from clip_train.interop.loading import load_weights
from clip_train.interop.reading import Weights, lasting
from clip_train.models import DualEncoder
from clip_train.models.adaptation import adapt, classifies, method_of, tower_of
from clip_train.models.classifiers import Task
from clip_train.models.name_classifier import NameClassifier
from clip_train.training.data_module import ClipDataModule
from clip_train.training.parts import plain
from clip_train.training.resume import Checkpoint

log = logging.getLogger(__name__)


def prepare(model: DualEncoder, cfg: DictConfig, data: ClipDataModule) -> Any:
    """The model made ready for fine-tuning; as it is for pretraining.

    Args:
        model: with the base's weights in place.
        cfg: of the run.
        data: has the classes, for a method that learns from labels.

    Raises:
        ConfigError: `finetune` has no such method, or it refuses its settings or the data.
    """
    if cfg.get("finetune") is None:
        return model
    settings = plain(cfg.finetune)
    if not classifies(settings):
        return adapt(model, settings)
    if cfg.micro_batch_size == "auto":
        raise ConfigError(f"micro_batch_size=auto does not try finetune={settings['method']}: give a number or null")
    return _classifier(model, settings, data)


def _classifier(model: DualEncoder, settings: dict, data: ClipDataModule) -> Any:
    classes, tokenizer = data.class_names, data.batches.tokenizer
    adapted = adapt(model, settings, Task(classes, tokenizer))
    if settings.get("classify"):
        return NameClassifier(adapted, classes, tokenizer)
    if adapted.own_classes_only:
        for name, batches in data.zero_shot_sets.items():
            if set_classes(batches).names != data.class_names.names:
                raise ConfigError(
                    f"eval.zero_shot.{name} has other classes than the training set, which finetune="
                    f"{settings['method']} cannot tell: leave it out, or give both the same class names"
                )
    return adapted


def load_base(model: DualEncoder, cfg: DictConfig, checkpoint: Checkpoint | None) -> Base | None:
    """Fill the model with the weights of `init_from`, unless the checkpoint that the run goes on from has them all.

    Returns:
        What the run's checkpoints go onto, if they hold only what is added to it.

    Raises:
        ConfigError: the weights cannot be read, do not fit, or are not those that the checkpoint goes onto; or the
            method would freeze random weights.
    """
    if cfg.get("finetune") is not None and method_of(plain(cfg.finetune)).adapter_only:
        return _load_known_base(model, cfg, checkpoint) if checkpoint else _load_new_base(model, cfg)
    if not checkpoint:
        weights = _load_initial_weights(model, cfg) if cfg.init_from else None
        _refuse_to_lock_random_weights(model, cfg, weights)
        pretrained = any(cfg.model[tower].get("pretrained") for tower in ("vision", "text"))
        if cfg.get("finetune") is not None and not weights and not pretrained:
            log.warning("finetune=%s begins with random weights: init_from=WEIGHTS gives others", cfg.finetune.method)
    return None


def _load_initial_weights(model: DualEncoder, cfg: DictConfig) -> Weights:
    source, trunk = str(cfg.init_from), model.vision.trunk.state_dict().keys()
    weights = read_whole(source, "init_from", trunk, ema=bool(cfg.get("init_from_ema")))
    load_weights(model, weights, f"init_from={source}")
    return weights


def _load_new_base(model: DualEncoder, cfg: DictConfig) -> Base:
    method, source = cfg.finetune.method, str(cfg.init_from)
    if not cfg.init_from:
        raise ConfigError(f"finetune={method} adds to weights that were trained: give init_from=WEIGHTS")
    weights = _load_initial_weights(model, cfg)
    if not weights.complete:
        raise ConfigError(f"init_from={source} is an image tower alone; finetune={method} needs weights of both towers")
    return Base(lasting(source), bool(cfg.get("init_from_ema")), weights.checksum())


def _load_known_base(model: DualEncoder, cfg: DictConfig, checkpoint: Checkpoint) -> Base:
    known = Base.of(checkpoint.manifest.about)
    if known is None:
        raise ConfigError(
            f"resume: {checkpoint.path} is of a run without finetune={cfg.finetune.method}: start a new run from its"
            f" weights with init_from={checkpoint.path}"
        )
    base = known.moved_to(str(cfg.init_from)) if cfg.init_from else known
    load_weights(model, read_base(base, f"resume: {checkpoint.path}"), f"init_from={base.weights}")
    return known


def _refuse_to_lock_random_weights(model: DualEncoder, cfg: DictConfig, weights: Weights | None) -> None:
    """LiT's tower must be a trained one, and a projection that is new must learn."""
    if cfg.get("finetune") is None or cfg.finetune.method != "lit" or (weights and weights.complete):
        return
    tower = tower_of(cfg.finetune.lock, "finetune.lock")
    if not cfg.model[tower].get("pretrained") and not (weights and tower == "vision"):
        raise ConfigError(
            f"finetune=lit locks random weights: give init_from=WEIGHTS, or model.{tower}.pretrained=true"
        )
    projection = getattr(model.get_submodule(tower), "projection", nn.Identity())
    if not cfg.finetune.unlocked_groups and any(True for _ in projection.parameters()):
        raise ConfigError("finetune.unlocked_groups=0 locks the tower's projection, which is new: give 1 or more")
