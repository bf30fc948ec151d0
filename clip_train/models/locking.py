"""Weights that stay as they are, and modules that behave as in evaluation because all of theirs do."""

from itertools import chain

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clip_train.errors import ConfigError
from clip_train.models.layers import layer_numbers


def freeze_logits(model: nn.Module) -> None:
    """No gradient for the temperature, nor for the bias."""
    for name, parameter in model.named_parameters(recurse=False):
        if name.startswith("logit_"):
            parameter.requires_grad_(False)


def lock_tower(tower: nn.Module, unlocked_groups: int) -> None:
    """Freeze a tower but for its last groups: what comes after the blocks is one, each block is one.

    Raises:
        ConfigError: groups are to be unlocked, and the tower has no blocks to count.
    """
    tower.requires_grad_(False)
    if not unlocked_groups:
        return
    try:
        numbers = layer_numbers(tower)
    except ConfigError as error:
        raise ConfigError(f"finetune.unlocked_groups: {error}; give 0") from error
    first = max(numbers.values()) + 1 - unlocked_groups
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(numbers[name] >= first)


def hold_still(model: nn.Module, freeze_bn_stats: bool = True) -> None:
    """Keep in evaluation mode, whatever mode the model is put into, each part whose weights are all frozen.

    So nothing in it is dropped at random, and batch norms keep their statistics, unless those are to go on.
    """
    if _is_still(model):
        for part in model.modules():
            if freeze_bn_stats or not isinstance(part, _BatchNorm):
                _stay_in_evaluation(part)
        return
    for child in model.children():
        if any(True for _ in _tensors(child)):
            hold_still(child, freeze_bn_stats)


def fixed_names(model: nn.Module) -> set[str]:
    """Names of what training leaves as it is: frozen weights, and the statistics of parts that are held still."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    held = {prefix for prefix, part in model.named_modules() if _stays_in_evaluation(part)}
    return frozen | {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in held}


def _tensors(module: nn.Module) -> chain[Tensor]:
    return chain(module.parameters(), module.buffers())


def _is_still(module: nn.Module) -> bool:
    return not any(tensor.requires_grad for tensor in _tensors(module))


def _stay_in_evaluation(module: nn.Module) -> None:
    def train(mode: bool = True) -> nn.Module:
        for child in module.children():
            child.train(mode)
        return module

    module.train, module.training = train, False


def _stays_in_evaluation(module: nn.Module) -> bool:
    return "train" in vars(module)
