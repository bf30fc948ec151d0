"""Linear layers whose products are of 8-bit floating-point numbers, by torchao: for GPUs from Ada and Hopper on."""

import torch
from torch import nn

from clip_train.errors import ConfigError
from clip_train.models.layers import blocks_of

_FIRST_CAPABILITY = (8, 9)
_MULTIPLE = 16  # of what the kernels take


def check_float8() -> None:
    """Raises ConfigError if torchao is not installed, or the GPU has no products in float8."""
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"trainer.float8=true needs torchao: pip install '.[torchao]' in the checkout ({error})"
        ) from error
    if not torch.cuda.is_available():
        raise ConfigError("trainer.float8=true needs a GPU with products in float8 (Ada, Hopper, later): leave it out")
    if (found := torch.cuda.get_device_capability()) < _FIRST_CAPABILITY:
        wanted = ".".join(map(str, _FIRST_CAPABILITY))
        raise ConfigError(
            f"trainer.float8=true needs a GPU of compute capability {wanted} (Ada, Hopper) or later, and this one has"
            f" {'.'.join(map(str, found))}: leave it out"
        )


def use_float8(model: nn.Module, emulate: bool = False) -> list[str]:
    """Turn the linear layers of a model's blocks that learn, and whose sides are multiples of 16, into float8 ones.

    Weights stay as they are, under their names; inputs, weights and gradients are scaled when they are multiplied.
    Patch embedding, projections and token embedding lie outside the blocks.

    Args:
        emulate: compute in fp32 what float8 would give, for tests.

    Returns:
        The names of these layers.

    Raises:
        ConfigError: there are none.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen = float8_layers(model)
    # Padded where the number of tokens, over which gradients of weights are summed, is no multiple.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in chosen)
    return chosen


def float8_layers(model: nn.Module) -> list[str]:
    """The names of the layers that `use_float8` converts. Raises ConfigError if there are none."""
    towers = [part for name, part in model.named_children() if name in ("vision", "text", "decoder")]
    inside = {id(module) for tower in towers for block in blocks_of(tower) for module in block.modules()}
    chosen = [name for name, module in model.named_modules() if id(module) in inside and _suits(module)]
    if not chosen:
        raise ConfigError(
            "trainer.float8=true finds no linear layer in the towers' blocks that learns and has sides that are"
            " multiples of 16: leave it out"
        )
    return chosen


def _suits(module: nn.Module) -> bool:
    # A subclass may use its weights otherwise, as attention does with those of its last layer.
    if type(module) is not nn.Linear or not module.weight.requires_grad:
        return False
    return module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0
