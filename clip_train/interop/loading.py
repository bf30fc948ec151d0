"""Weights from elsewhere into a model: what fits, what is stretched, and what is refused."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clip_train.checkpoints.choice import weight_differences
from clip_train.errors import ConfigError
from clip_train.interop.reading import Weights
from clip_train.models import DualEncoder
from clip_train.models.captioner import Captioner
from clip_train.models.positions import resize_image_positions, stretch_text_positions

log = logging.getLogger(__name__)

_IMAGE_POSITIONS = ("vision.trunk.pos_embed", "vision.trunk.head.pos_embed")
_TEXT_POSITIONS = "text.trunk.embeddings.position_embedding.weight"
_FEATURE_ADAPTERS = ("image_adapter.", "text_adapter.")
_TOWERS = (
    ("image tower", ("vision.", "visual.", "vision_model.")),
    ("decoder", ("decoder.", "text_decoder.")),
    ("text tower", ("text",)),
    ("logits", ("logit_",)),
)


def load_weights(model: DualEncoder, weights: Weights, name: str) -> None:
    """Fill a model. Of an image tower alone, the trunk is filled and all else stays.

    Positions of another image size or text length are interpolated. A bias of the logits that only one of the two has
    is left as it is, or out: losses without one would not see it.

    Args:
        model: to be filled.
        weights: under our names.
        name: of the weights, for messages: `init_from=PATH`.

    Raises:
        ConfigError: weights are missing, unexpected, or of another shape, listed by tower; or they were trained with
            another activation; or there is a CLIP-Adapter among them.
    """
    expected = {
        key: value for key, value in model.state_dict().items() if weights.complete or key.startswith("vision.trunk.")
    }
    _check_activation(model, weights, name)
    if any(key.startswith(_FEATURE_ADAPTERS) for key in weights.tensors):
        raise ConfigError(
            f"{name} has a CLIP-Adapter, which cannot be merged into the towers: it can be exported as"
            " format=safetensors only, and trained on with resume="
        )
    found = _with_bias_of(expected, weights.tensors, name)
    _fit_positions(model, expected, found, name)
    if differences := differences_by_tower(expected, found):
        raise ConfigError(f"{name} ({weights.layout}) does not fit the model: {differences}")
    model.load_state_dict(found, strict=weights.complete)
    log.info("starting from %s: %s, %d weights", name, weights.layout, len(found))


def differences_by_tower(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How found weights differ in name and shape from those of a model, tower by tower; empty if they do not."""
    shapes = [{key: tuple(value.shape) for key, value in side.items()} for side in (expected, found)]
    parts = []
    for tower in dict.fromkeys(map(_tower, (*expected, *found))):
        of_tower = [{key: shape for key, shape in side.items() if _tower(key) == tower} for side in shapes]
        if differences := weight_differences(*of_tower):
            parts.append(f"{tower}: {differences}")
    return "; ".join(parts)


def _tower(name: str) -> str:
    bare = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.")  # open_clip's text tower
    if name.startswith(bare):
        return "text tower"
    return next((tower for tower, prefixes in _TOWERS if name.startswith(prefixes)), "neither tower")


def _check_activation(model: DualEncoder, weights: Weights, name: str) -> None:
    """No name or shape would tell, and the embeddings would be poor ones."""
    activation = getattr(model.text.trunk.config, "hidden_act", None)
    if None not in (activation, weights.quick_gelu) and (activation == "quick_gelu") != weights.quick_gelu:
        theirs, setting = ("QuickGELU", "true") if weights.quick_gelu else ("GELU", "false")
        raise ConfigError(
            f"{name} was trained with {theirs}, the model has {activation}: give model.quick_gelu={setting}"
        )


def _with_bias_of(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    found = dict(found)
    if "logit_bias" in found and "logit_bias" not in expected:
        log.info("%s: its logit_bias is left out, the model has none", name)
        del found["logit_bias"]
    if "logit_bias" in expected and "logit_bias" not in found:
        log.info("%s has no logit_bias: the model keeps its own", name)
        found["logit_bias"] = expected["logit_bias"]
    return found


def _fit_positions(model: DualEncoder, expected: Mapping[str, Tensor], found: dict[str, Tensor], name: str) -> None:
    """Interpolate what was found where only the number of positions differs."""
    for key in _IMAGE_POSITIONS:
        if _other_length(expected, found, key):
            count, (grid, prefix) = found[key].shape[-2], _grid(model.vision.trunk, expected[key].shape[-2])
            try:
                found[key] = resize_image_positions(found[key].float(), grid, prefix)
            except ValueError as error:
                raise ConfigError(f"{name}: its image positions cannot be interpolated: {error}") from error
            log.info("%s: %d positions of images interpolated to %d x %d patches", name, count - prefix, *grid)
    if _other_length(expected, found, _TEXT_POSITIONS):
        count, length = len(found[_TEXT_POSITIONS]), len(expected[_TEXT_POSITIONS])
        own = 1 if isinstance(model, Captioner) else 0  # the position of its token at the end stays
        words, last = found[_TEXT_POSITIONS].float().split([count - own, own])
        found[_TEXT_POSITIONS] = torch.cat([stretch_text_positions(words, length - own), last])
        log.info("%s: %d positions of texts %s %d", name, count, "stretched to" if length > count else "cut to", length)


def _other_length(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], key: str) -> bool:
    """Whether both have these positions, equally wide, and not equally many."""
    if key not in expected or key not in found or expected[key].ndim != found[key].ndim:
        return False
    (*_, length, width), (*_, found_length, found_width) = expected[key].shape, found[key].shape
    return width == found_width and length != found_length


def _grid(trunk: Any, positions: int) -> tuple[tuple[int, int], int]:
    """Rows and columns of a trunk's positions, and how many more there are before them."""
    if hasattr(trunk, "patch_embed"):
        rows, columns = trunk.patch_embed.grid_size
    else:  # attention pooling over a ResNet's last map
        rows = columns = math.isqrt(positions)
    return (rows, columns), positions - rows * columns
