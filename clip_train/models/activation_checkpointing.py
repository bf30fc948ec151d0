"""Blocks that keep less for backward than they computed: only their inputs, or the products of matrices besides."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from clip_train.errors import ConfigError, first_line
from clip_train.models.layers import innermost_blocks

NONE, BLOCKS, SELECTIVE = "none", "blocks", "selective"
MODES = (NONE, BLOCKS, SELECTIVE)

_aten = torch.ops.aten
# To make a number of a layer's product again takes thousands of operations, of a normalisation, an activation or a sum
# a few. Batched products are not here: those are attention's where it is written out, whose scores are many.
_PRODUCTS = {
    _aten.mm,
    _aten.addmm,
    _aten._scaled_mm,
    _aten.convolution,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
    _aten._scaled_dot_product_fused_attention_overrideable,
}


def checkpointing_mode(value: object) -> str:
    """One of `MODES`, of what `model.grad_checkpointing` says: true is `blocks`, false is `none`.

    Raises:
        ConfigError: it is none of these.
    """
    mode = (BLOCKS if value else NONE) if isinstance(value, bool) else value
    if mode not in MODES:
        raise ConfigError(f"model.grad_checkpointing={value} is none of {', '.join(MODES)}")
    return str(mode)


def checkpoint_blocks(tower: nn.Module, mode: str) -> None:
    """From now on each block of a tower in training computes again in backward what `mode` does not keep.

    It is the block's `forward` that is replaced, so that weights keep their names, and what comes around it stays
    outside: hooks, FSDP's gathering of weights, and the graph of a block that is compiled (`block.compile()`), which
    takes in the call and the checkpoint with it.

    Args:
        mode: `blocks` or `selective`.

    Raises:
        ConfigError: there are no blocks.
    """
    blocks = innermost_blocks(tower)
    if not blocks:
        name = type(getattr(tower, "trunk", tower)).__name__
        raise ConfigError(f"model.grad_checkpointing={mode}: {name} has no blocks to compute again; give {NONE}")
    for block in blocks:
        if mode == SELECTIVE:
            _overwrite_nothing(block)
        block.forward = partial(_checkpointed, block.forward, mode)


def is_checkpointed(tower: nn.Module) -> bool:
    """Whether `checkpoint_blocks` was called on it."""
    forwards = [block.forward for block in innermost_blocks(tower)]
    return any(isinstance(forward, partial) and forward.func is _checkpointed for forward in forwards)


def _overwrite_nothing(block: nn.Module) -> None:
    """An activation in place would be of a product that is kept."""
    for module in block.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # pyright: ignore[reportArgumentType]


def _checkpointed(forward: Any, mode: str, *inputs: Any, **options: Any) -> Any:
    """A block's own forward, a bound method, of which little is kept."""
    block = forward.__self__
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs, **options)
    name = type(block).__name__
    if not torch.compiler.is_compiling():  # which computes again what has no effects
        norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
        forward = _twice(forward, norms, f"model.grad_checkpointing={mode}: {name}")
    contexts = {"context_fn": partial(_contexts, name)} if mode == SELECTIVE else {}
    inputs, options = tuple(map(_as_it_is, inputs)), {key: _as_it_is(x) for key, x in options.items()}
    with _casting_anew():
        return checkpoint(forward, *inputs, use_reentrant=False, **contexts, **options)


def _as_it_is(value: Any) -> Any:
    """A list of its own: a dense network appends each block's output to the one that it gave the block."""
    return value.copy() if type(value) in (list, dict) else value


def _contexts(name: str) -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_Policy(name))


class _Policy:
    """Which operators' outputs one call of a block keeps.

    Raises:
        ConfigError: the block overwrites what is kept.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._kept: set[int] = set()

    def __call__(
        self, context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        schema = getattr(operator, "_schema", None)
        if schema is not None and schema.is_mutable and not self._kept.isdisjoint(_written(schema, args)):
            raise ConfigError(
                f"model.grad_checkpointing={SELECTIVE}: {self._name} computes in place ({operator}) on what is to be"
                f" kept; give {BLOCKS}"
            )
        if getattr(operator, "overloadpacket", None) not in _PRODUCTS or _drops(schema, args, kwargs):
            return CheckpointPolicy.PREFER_RECOMPUTE
        found = getattr(context, "op_output", None)  # before torch 2.12 only autograd finds what is overwritten
        self._kept |= {_storage(x) for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Tensor)}
        return CheckpointPolicy.MUST_SAVE


def _written(schema: Any, args: tuple[Any, ...]) -> set[int]:
    """Storages of the arguments that an operator overwrites."""
    pairs = [(known.alias_info, x) for known, x in zip(schema.arguments, args)]  # an `out=` is an output of its own
    return {_storage(x) for alias, x in pairs if alias and alias.is_write and isinstance(x, Tensor)}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _drops(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an attention drops at random: if that were not drawn again, what is drawn after it would be other."""
    names = [argument.name for argument in schema.arguments]
    return bool({**dict(zip(names, args)), **kwargs}.get("dropout_p"))


def _twice(forward: Callable[..., Any], norms: list[_BatchNorm], what: str) -> Callable[..., Any]:
    """The same, but that batch norms note the statistics of a batch once: not again when it is computed again."""
    done = False

    def run(*inputs: Any, **options: Any) -> Any:
        nonlocal done
        if done:
            with _noting_nothing(norms), _refusing(what):
                return forward(*inputs, **options)
        done = True
        return forward(*inputs, **options)

    return run


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """A block that cannot be computed again has changed something for itself, such as a cache or a range that it notes.

    Raises:
        ConfigError: it cannot.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError):  # of the machine
        raise
    except RuntimeError as error:
        raise ConfigError(f"{what} cannot be computed again ({first_line(error)}); give {NONE}") from error


@contextmanager
def explained_recomputation() -> Iterator[None]:
    """For a backward pass of blocks that are computed again.

    Raises:
        ConfigError: one computed something else than the first time.
    """
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(
            f"model.grad_checkpointing: a block computes something else when it is computed again"
            f" ({first_line(error)}); give {NONE}"
        ) from error


@contextmanager
def _noting_nothing(norms: list[_BatchNorm]) -> Iterator[None]:
    noted = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, noted):
            norm.momentum, norm.num_batches_tracked = momentum, count


@contextmanager
def _casting_anew() -> Iterator[None]:
    """Autocast's casts of weights are made where they are used, inside, and not kept.

    Else what a first call of a block has left would be missing when a second one is computed again, and its operators
    would not be those that were noted. And all weights' casts would stay until the end of forward.
    """
    if torch.compiler.is_compiling():  # a graph has no such memory
        yield
        return
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
