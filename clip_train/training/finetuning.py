"""What a run trains: the model of its config, with the weights it begins with, adapted as `finetune` says."""

from omegaconf import DictConfig
from torch import nn

from clip_train.models import DualEncoder
from clip_train.models.adaptation import adapt
from clip_train.training.parts import plain


def prepare(model: DualEncoder, cfg: DictConfig) -> nn.Module:
    """The model made ready for fine-tuning; as it is for pretraining.

    Args:
        model: with the base's weights in place.
        cfg: of the run.

    Raises:
        ConfigError: `finetune` has no such method, or it refuses its settings.
    """
    return model if cfg.get("finetune") is None else adapt(model, plain(cfg.finetune))
