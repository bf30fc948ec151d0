"""What a run trains: the model of its config, with the weights it begins with, adapted as `finetune` says."""

from omegaconf import DictConfig
from torch import nn

from clip_train.errors import ConfigError
from clip_train.evaluation.zero_shot import set_classes
from clip_train.models import DualEncoder
from clip_train.models.adaptation import adapt, method_of
from clip_train.models.classifiers import Task
from clip_train.training.data_module import ClipDataModule
from clip_train.training.parts import plain


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
