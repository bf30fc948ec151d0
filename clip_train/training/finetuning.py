"""What a run begins with: the weights of `init_from`, and the model adapted as `finetune` says."""

from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from clip_train.checkpoints.base import Base, weights_checksum
from clip_train.errors import ConfigError
from clip_train.evaluation.zero_shot import set_classes
from clip_train.interop.joining import read_base, read_whole
from clip_train.interop.loading import load_weights
from clip_train.interop.reading import HUB
from clip_train.models import DualEncoder
from clip_train.models.adaptation import adapt, method_of, tower_of
from clip_train.models.classifiers import Task
from clip_train.training.data_module import ClipDataModule
from clip_train.training.parts import plain
from clip_train.training.resume import Checkpoint


def prepare(model: DualEncoder, cfg: DictConfig, data: ClipDataModule) -> nn.Module:
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
    if not method_of(settings).classifies:
        return adapt(model, settings)
    if cfg.micro_batch_size == "auto":
        raise ConfigError(f"micro_batch_size=auto does not try finetune={settings['method']}: give a number or null")
    return _classifier(model, settings, data)


def _classifier(model: DualEncoder, settings: dict, data: ClipDataModule) -> nn.Module:
    adapted = adapt(model, settings, Task(data.class_names, data.batches.tokenizer))
    if adapted.own_classes_only:
        for name, batches in data.zero_shot_sets.items():
            if set_classes(batches).names != data.class_names.names:
                raise ConfigError(
                    f"eval.zero_shot.{name} has other classes than the training set, which finetune="
                    f"{settings['method']} cannot tell: leave it out, or give both the same class names"
                )
    return adapted


def adapter_only(cfg: DictConfig) -> bool:
    """Whether the run's checkpoints hold only what is added to a base. Raises ConfigError for an unknown method."""
    return cfg.get("finetune") is not None and method_of(plain(cfg.finetune)).adapter_only


def load_base(model: DualEncoder, cfg: DictConfig, checkpoint: Checkpoint | None) -> Base | None:
    """Fill the model with the weights of `init_from`, where the checkpoint that the run goes on from has not all.

    Returns:
        Of a run whose checkpoints hold only what is added: what they go onto.

    Raises:
        ConfigError: the weights cannot be read, do not fit, or are not those that the checkpoint goes onto; or the
            method would freeze random weights.
    """
    only_added = adapter_only(cfg)
    known = Base.of(checkpoint.manifest.about) if checkpoint and only_added else None
    source = str(cfg.init_from) if cfg.init_from else known.weights if known else None
    if source is None:
        _refuse_random_base(cfg, checkpoint)
        return None
    if checkpoint and not only_added:
        return None
    ema = known.ema if known else bool(cfg.get("init_from_ema"))
    if known:
        assert checkpoint
        weights = read_base(Base(source, ema, known.checksum), f"resume: {checkpoint.path}")
    else:
        weights = read_whole(source, "init_from", trunk=model.vision.trunk.state_dict().keys(), ema=ema)
    load_weights(model, weights, f"init_from={source}")
    if not only_added:
        return None
    if not weights.complete:
        raise ConfigError(
            f"init_from={source} is an image tower alone; finetune={cfg.finetune.method} freezes both towers:"
            " give weights of both"
        )
    return known or Base(_lasting_name(source), ema, weights_checksum(weights.tensors))


def _refuse_random_base(cfg: DictConfig, checkpoint: Checkpoint | None) -> None:
    """Random weights that are frozen stay random."""
    if cfg.get("finetune") is None or checkpoint or cfg.finetune.method == "full":
        return
    if cfg.finetune.method == "lit":
        tower = tower_of(cfg.finetune.lock, "finetune.lock")
        if cfg.model[tower].get("pretrained"):
            return
        raise ConfigError(
            f"finetune=lit locks random weights: give init_from=WEIGHTS, or model.{tower}.pretrained=true"
        )
    raise ConfigError(f"finetune={cfg.finetune.method} adds to weights that were trained: give init_from=WEIGHTS")


def _lasting_name(source: str) -> str:
    """As it can be found from another working directory."""
    return source if source.startswith(HUB) else str(Path(source).resolve())
