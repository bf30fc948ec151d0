"""All weights of a model: read from one place, joined with the base they go onto, or mixed with others."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clip_train.checkpoints.base import Base
from clip_train.checkpoints.choice import weight_differences
from clip_train.errors import ConfigError
from clip_train.interop.loading import load_weights
from clip_train.interop.reading import Weights, read_weights
from clip_train.models import create_dual_encoder
from clip_train.models.adaptation import adapt, method_of
from clip_train.models.locking import fixed_names

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightSource:
    """Which weights to take.

    Attributes:
        weights: what `read_weights` takes.
        ema: the averages of a checkpoint (`ema.decay`) in place of the weights that were trained.
        base: where the base of an adapter-only checkpoint is now, if not where it was.
        interpolate: weights to mix them with; None for none.
        alpha: share of `weights` in that mixture.
    """

    weights: str
    ema: bool = False
    base: str | None = None
    interpolate: str | None = None
    alpha: float = 0.5

    @classmethod
    def of(cls, source: "str | Path | WeightSource") -> "WeightSource":
        return source if isinstance(source, WeightSource) else cls(str(source))


def read_source(source: WeightSource) -> Weights:
    """The weights that `clip-export` was told to take.

    Raises:
        ConfigError: they cannot be read, or not be mixed.
    """
    found = read_whole(source.weights, "weights", ema=source.ema, base=source.base)
    if source.interpolate is None:
        return found
    other = read_whole(source.interpolate, "interpolate")
    return interpolated(other, found, source.alpha, f"interpolate={source.interpolate}")


def read_whole(
    source: str, key: str, trunk: Collection[str] = (), ema: bool = False, base: str | None = None
) -> Weights:
    """As `read_weights`; an adapter-only checkpoint comes joined with its base, and merged into it if that can be done.

    Args:
        source, key, trunk, ema: as there.
        base: where the base is now, if not where the checkpoint says.

    Raises:
        ConfigError: they cannot be read, or the base is gone or is another.
    """
    found = read_weights(source, key, trunk, ema)
    named = Base.of(found.manifest.about) if found.manifest else None
    if named is None:
        return found
    assert found.manifest
    config = found.manifest.about["config"]
    model = create_dual_encoder(**from_scratch(config["model"]))
    named = named.moved_to(base) if base else named
    load_weights(model, read_base(named, f"{key}={source}"), f"base={named.weights}")
    adapted = adapt(model, config["finetune"])
    _load_learned(adapted, found, f"{key}={source}")
    method_of(config["finetune"]).merge(adapted)
    log.info("%s=%s: finetune=%s, on %s", key, source, config["finetune"]["method"], named.weights)
    tensors = {name: tensor.detach() for name, tensor in adapted.state_dict().items()}
    return replace(found, tensors=tensors, read_checksum=f"{found.checksum()}+{named.checksum}")


def read_base(base: Base, name: str) -> Weights:
    """The base of an adapter-only checkpoint.

    Args:
        base: as the checkpoint names it.
        name: of what needs it, for messages.

    Raises:
        ConfigError: it is gone, or has changed.
    """
    try:
        found = read_whole(base.weights, "base", ema=base.ema)
    except ConfigError as error:
        raise ConfigError(f"{name} holds only what was added to its base, which cannot be read: {error}") from error
    if found.checksum() != base.checksum:
        raise ConfigError(f"{name} goes onto another base than {base.weights}: its weights are not those of the run")
    return found


def _load_learned(model: nn.Module, found: Weights, name: str) -> None:
    fixed = fixed_names(model)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in fixed}
    if differences := weight_differences(expected, {key: tuple(x.shape) for key, x in found.tensors.items()}):
        raise ConfigError(f"{name} does not fit what its config says was added: {differences}")
    model.load_state_dict(found.tensors, strict=False)


def interpolated(base: Weights, tuned: Weights, alpha: float, name: str) -> Weights:
    """(1 - alpha) base + alpha tuned, weight by weight: WiSE-FT (Wortsman et al., 2022, arXiv:2109.01903).

    Args:
        base, tuned: of one model.
        alpha: from 0, the base, to 1.
        name: of the base, for messages.

    Raises:
        ConfigError: alpha is no share, or the weights are of two models.
    """
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ConfigError(f"alpha={alpha} is a share: give at least 0 and at most 1")
    shapes = [{key: tuple(tensor.shape) for key, tensor in side.tensors.items()} for side in (tuned, base)]
    if differences := weight_differences(*shapes):
        raise ConfigError(f"{name} is of another model than weights=: {differences}")
    if None not in (base.quick_gelu, tuned.quick_gelu) and base.quick_gelu != tuned.quick_gelu:
        raise ConfigError(f"{name} was trained with another activation than weights=")
    mixed = {
        key: torch.lerp(base.tensors[key].float(), tensor.float(), alpha) if tensor.is_floating_point() else tensor
        for key, tensor in tuned.tensors.items()
    }
    quick_gelu = base.quick_gelu if tuned.quick_gelu is None else tuned.quick_gelu
    return replace(tuned, tensors=mixed, quick_gelu=quick_gelu, read_checksum=None)


def from_scratch(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `model` config without weights that a tower would fetch first."""
    towers = {
        tower: {key: value for key, value in config[tower].items() if key != "pretrained"}
        for tower in ("vision", "text")
    }
    return {**config, **towers, "grad_checkpointing": False}
