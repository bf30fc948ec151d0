"""Model FLOPs utilisation (PaLM, arXiv:2204.02311): of what a device could multiply, the share the model needs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clip_train.data.batches import Batch
from clip_train.errors import ConfigError, first_line
from clip_train.models.text_lengths import TokenIds
from clip_train.planning.hardware import Hardware, find_hardware, known_gpu
from clip_train.planning.towers import COUNTS, PlannedModel

log = logging.getLogger(__name__)

SETTING = "trainer.hardware"
_REMEDY = f"no train/mfu: give {SETTING}=FILE that `clip-plan calibrate` wrote, or a name of clip-plan's table"


@dataclass(frozen=True)
class PairFlops:
    """Operations that training on a pair needs, a multiplication and an addition being two.

    Attributes:
        image: of its picture, and of the whole model where a text's length makes no difference.
        text: coefficients of a polynomial in the tokens of its text, the constant first.
        context_length: tokens of a text whose length is not known.
    """

    image: float
    text: tuple[float, ...]
    context_length: int

    def of(self, pairs: int, lengths: Int64[np.ndarray, " b"] | None) -> float:
        """Of so many pairs with texts of these lengths, or all of the whole context."""
        tokens = np.full(pairs, self.context_length) if lengths is None else lengths
        return pairs * self.image + float(np.polynomial.polynomial.polyval(tokens.astype(float), self.text).sum())


def count_pair_flops(model: Mapping[str, Any], finetune: Mapping[str, Any] | None) -> PairFlops:
    """Three times those of forward, as backward is two products for each; less for what does not learn.

    What is recomputed in backward is not counted. Of a text its own tokens are, and not its padding, where the tower
    can leave that out.

    Args:
        model, finetune: the groups of the config.

    Raises:
        ConfigError: the model cannot be counted without its data.
    """
    config = {key: value for key, value in model.items() if key != "grad_checkpointing"}
    with torch.random.fork_rng(devices=[]):
        planned = PlannedModel(config, finetune)
        context = planned.context_length
        towers = planned.model.train()
        if not hasattr(towers.text, "measure"):
            whole = planned.count_flops()
            learns = all(parameter.requires_grad for parameter in towers.parameters())
            return PairFlops(3 * whole.forward_total if learns else whole.training, (0.0,), context)
        towers.text.length_multiple = 1  # pyright: ignore[reportArgumentType]
        image = _training_flops(planned, [towers.vision, towers.image_adapter], towers.encode_image, 0)
        lengths = np.unique([max(context // 3, 1), max(2 * context // 3, 1), context])
        text = [
            _training_flops(planned, [towers.text, towers.text_adapter], towers.encode_text, 1, tokens)
            for tokens in lengths.tolist()
        ]
    # Products of tokens with weights, and of tokens with tokens.
    return PairFlops(image, tuple(np.polynomial.polynomial.polyfit(lengths, text, len(lengths) - 1)), context)


def _training_flops(
    planned: PlannedModel, parts: Sequence[nn.Module], encode: Any, side: int, tokens: int | None = None
) -> float:
    """Of one side of a pair; counted backward only where some weights learn and others do not."""
    learns = {parameter.requires_grad for part in parts for parameter in part.parameters()}
    with planned.fake():
        inputs = planned.inputs(2, tokens)[side]
        with FlopCounterMode(display=False, custom_mapping=COUNTS) as forward:
            features: Tensor = encode(inputs)
        with FlopCounterMode(display=False, custom_mapping=COUNTS) as backward:
            if learns == {True, False}:
                planned.backward((features,))
    per_forward = 3 if learns == {True} else 1
    return (per_forward * forward.get_total_flops() + backward.get_total_flops()) / 2


class Utilisation:
    """Adds up what this rank's batches need of operations; reports nothing where the device's rate is not known.

    Args:
        model, finetune: the groups of the config.
        hardware: `trainer.hardware`; None goes by the GPU's name.

    Raises:
        ConfigError: there is no such hardware.
    """

    def __init__(self, model: Mapping[str, Any], finetune: Mapping[str, Any] | None, hardware: str | None) -> None:
        self._model, self._finetune = model, finetune
        self._hardware = None if hardware is None else find_hardware(str(hardware), SETTING)
        self._rate = self._needed = 0.0
        self._pair: PairFlops | None = None

    def start(self, trainer: L.Trainer, device: torch.device) -> None:
        """Find the device's rate and count the model's operations, on the first rank, whose metrics are logged."""
        hardware = self._hardware or _by_name(device)
        if not trainer.is_global_zero:
            return
        if hardware is None:
            log.info("%s is not in clip-plan's table: %s", _called(device), _REMEDY)
            return
        try:
            self._pair = count_pair_flops(self._model, self._finetune)
        except ConfigError as error:
            log.info("no train/mfu: %s", error)
        except Exception as error:  # a model of the user's, on tensors that hold nothing; training does not need this
            log.warning("no train/mfu: the model cannot be counted (%s: %s)", type(error).__name__, first_line(error))
        self._rate = hardware.rate(str(trainer.precision))

    def add(self, batch: Batch) -> None:
        """Of a step's batch on this rank."""
        if self._pair is not None:
            texts: Any = batch["text"]
            self._needed += self._pair.of(len(batch["image"]), texts.lengths if isinstance(texts, TokenIds) else None)

    def metrics(self, seconds: float) -> dict[str, float]:
        """`train/mfu` of the batches since the last reading, which took so long."""
        needed, self._needed = self._needed, 0.0
        return {} if self._pair is None else {"train/mfu": needed / seconds / self._rate}


def _by_name(device: torch.device) -> Hardware | None:
    return known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _called(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"
