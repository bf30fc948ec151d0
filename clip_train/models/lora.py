"""LoRA and DoRA through peft: put into a tower, and merged into its weights."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from clip_train.errors import ConfigError, first_line
from clip_train.models.layers import blocks_of


def add_lora(
    tower: nn.Module, *, rank: int, alpha: float, dropout: float, use_dora: bool, target_modules: Sequence[str] | None
) -> None:
    """Low-rank changes beside layers of a tower's trunk, zero at first; the layers become `NAME.base_layer`.

    Args:
        tower: whose weights are all frozen by this.
        rank, alpha, dropout, use_dora: peft's `LoraConfig` explains them.
        target_modules: ends of the names of layers; None for the linear layers of the blocks.

    Raises:
        ConfigError: peft is not installed, or refuses a setting; or there is no such layer.
    """
    peft = _import_peft()
    trunk = tower.get_submodule("trunk")
    config = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_dora": use_dora}
    try:
        targets = list(target_modules or _layers_of_blocks(trunk))
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets, **config), trunk)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"finetune: peft refuses {config} for {type(trunk).__name__}: {first_line(error)}") from error
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merge_lora(model: nn.Module) -> None:
    """Add all low-rank changes to the weights they belong to, which get back their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            cast(Any, layer).merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())


def _layers_of_blocks(trunk: nn.Module) -> list[str]:
    """The linear layers inside the blocks; of a network without any, its convolutions."""
    inside = {part for block in blocks_of(trunk) for part in block.modules()}
    for kind in (nn.Linear, nn.Conv2d):
        found = [name for name, part in trunk.named_modules() if part in inside and isinstance(part, kind)]
        found = [name for name in found if getattr(trunk.get_submodule(name), "groups", 1) == 1]
        if found:
            return found
    raise ConfigError(
        f"finetune.target_modules: {type(trunk).__name__} has no linear layers in blocks; name those to adapt"
    )


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("finetune=lora needs peft: pip install '.[finetune]' in the checkout") from error
    return peft
