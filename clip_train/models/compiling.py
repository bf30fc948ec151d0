"""Each block of the towers by torch.compile: one compilation serves all blocks of a kind, as their code is the same.

Compiled in place, so that weights keep their names, and block by block (regional compilation): in the time for one
block, and checkpointing, FSDP and what changes blocks work between them as they do without.
"""

import logging
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shape_config

from clip_train.errors import ConfigError
from clip_train.models.layers import innermost_blocks

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # torch's names
# Those that make CUDA graphs, and what is left of them without.
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
CUDA_GRAPHS = tuple(WITHOUT_GRAPHS)
# Compilations of one piece of code. torch's 8 are fewer than a convolutional network has widths, or a tower rates of
# stochastic depth, each with gradients, without and in evaluation; what is over would run uncompiled.
_MOST_VARIANTS = 256
# They warn of a missing CUDA toolkit, which no processor needs, and of selective activation checkpoints.
_NOISY = ("torch.utils.cpp_extension", "torch._dynamo.variables.higher_order_ops")


def compile_mode(choice: bool | str) -> str | None:
    """The mode that `trainer.compile` asks for: None for false, torch's default for true.

    Raises:
        ConfigError: it is none of torch's.
    """
    if isinstance(choice, bool):
        return MODES[0] if choice else None
    if choice not in MODES:
        raise ConfigError(f"trainer.compile={choice} is none of false, true, {', '.join(MODES)}")
    return choice


def compile_blocks(model: nn.Module, mode: str = "default", backend: str = "inductor") -> None:
    """Compile the blocks of both towers, and of a decoder, when they are first called.

    A compilation is for any number of pictures, or of texts of any length, but that a single one, forward without
    gradients and evaluation have their own. Convolutions are compiled for each shape.

    Args:
        model: with a tower as `vision`, `text` or `decoder`, or several; its weights in place, and not yet sharded.
        mode: one of torch's `MODES`. Those with CUDA graphs have them in the image tower only: a graph is for one
            shape, and texts have many.
        backend: torch's name of the compiler.
    """
    _set_up_dynamo()
    for name in ("vision", "text", "decoder"):
        tower: Any = getattr(model, name, None)
        if tower is None:
            continue
        own = mode if name == "vision" else WITHOUT_GRAPHS.get(mode, mode)
        options = _options(own) if backend == "inductor" else {}
        for block in innermost_blocks(tower):
            # Not first for one shape and then for any, as is torch's default: where both fit, a block that is computed
            # again for its checkpoint may meet the other (pytorch/pytorch#166926).
            block.compile(backend=backend, dynamic=not convolves(block), options=options)
        if own in CUDA_GRAPHS:
            # What the step before left in the graphs' memory is done with.
            tower.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())


def _set_up_dynamo() -> None:
    config = torch._dynamo.config
    # It would cut blocks at the buckets of DDP, beside which they are small, and refuses those with checkpoints.
    config.optimize_ddp = False
    config.recompile_limit = max(_MOST_VARIANTS, config.recompile_limit)
    config.accumulated_recompile_limit = max(_MOST_VARIANTS, config.accumulated_recompile_limit)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Or sizes that are equal by chance at first would have to stay so, and all be compiled again when they are not.
    shape_config.use_duck_shape = False


def convolves(block: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.conv._ConvNd) for part in block.modules())


def check_compiler(setting: str, otherwise: str) -> None:
    """Raises ConfigError if nothing can be compiled here: for a GPU, too, some C++ is.

    Args:
        setting: that asks for it.
        otherwise: the setting that does not.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise ConfigError(f"{setting} needs Python's headers, and {header} is not there: install them, or {otherwise}")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            f"{setting} needs a C++ compiler, and there is none: install g++, say in CXX where it is, or {otherwise}"
        ) from error


def _options(mode: str) -> dict[str, Any]:
    # Random numbers as uncompiled: a micro-batch that is encoded again draws the same, and so does a resumed run.
    return {**torch._inductor.list_mode_options(mode), "fallback_random": True}
