"""The model of a config without its weights: tensors with shapes and no memory, on which a step can be counted."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from clip_train.errors import ConfigError
from clip_train.models import DualEncoder, create_dual_encoder
from clip_train.models.activation_checkpointing import explained_recomputation
from clip_train.models.adaptation import adapt, classifies
from clip_train.models.captioner import Captioner
from clip_train.models.text_lengths import TokenIds

OTHER = "other"
_PARTS = ("vision", "text", "decoder")
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_KEPT_SCALARS = ("logit_scale", "logit_bias")  # fp32 whatever the model is converted to


@dataclass(frozen=True)
class Flops:
    """Operations per sample: a multiplication and an addition are two.

    Attributes:
        forward: by part of the model.
        training: forward and backward of all parts, what is recomputed included.
        float8: forward, of the layers that compute in float8.
    """

    forward: Mapping[str, float]
    training: float
    float8: float = 0.0

    @property
    def forward_total(self) -> float:
        """Of all parts."""
        return sum(self.forward.values())


class PlannedModel:
    """A model to count on. It has the device semantics of a CPU, whose kernels keep for backward what a GPU's keep.

    Args:
        config: the `model` group; towers are not loaded, whatever `pretrained` says.
        finetune: the `finetune` group, if there is one.
        precision: `trainer.precision`.

    Raises:
        ConfigError: the config cannot be built, or a method of fine-tuning needs the data's classes.

    Attributes:
        model: of fake tensors; to be used inside `fake()`.
        image_size, context_length: of the inputs.
    """

    model: DualEncoder

    def __init__(self, config: Mapping[str, Any], finetune: Mapping[str, Any] | None = None, precision: str = "32"):
        if classifies(finetune):
            raise ConfigError(
                f"finetune={(finetune or {})['method']} needs the data's classes: clip-plan cannot plan it"
            )
        config = {**config, **{tower: _without_weights(config[tower]) for tower in ("vision", "text")}}
        self.image_size, self.context_length = int(config["image_size"]), int(config["text"]["context_length"])
        self._mode, self._precision = FakeTensorMode(), precision
        with torch.device("meta"):
            model = create_dual_encoder(**config)
            self.model = model if finetune is None else adapt(model, finetune)
        with self._mode:
            _make_fake(self.model, torch.bfloat16 if precision == "bf16-true" else None)

    @contextmanager
    def fake(self) -> Iterator[None]:
        """Where nothing is computed, and masks keep everything: captions are taken as full."""
        with self._mode, _KeepAll():
            yield

    def autocast(self) -> AbstractContextManager:
        """As Lightning's precision plugin computes."""
        dtype = _AUTOCAST.get(self._precision)
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    @cached_property
    def parts(self) -> dict[str, nn.Module]:
        """The towers, and a decoder if there is one, by name."""
        return {name: part for name, part in self.model.named_children() if name in _PARTS}

    def parameters(self) -> dict[str, int]:
        """Numbers in each part, and in what is beside them."""
        found = {name: sum(p.numel() for p in part.parameters()) for name, part in self.parts.items()}
        rest = sum(p.numel() for p in self.model.parameters()) - sum(found.values())
        return found | ({OTHER: rest} if rest else {})

    def inputs(self, pairs: int, tokens: int | None = None) -> tuple[Tensor, Tensor | TokenIds]:
        """A batch as the model takes it, of texts that all have so many tokens (the whole context if None)."""
        pixels = torch.empty(pairs, 3, self.image_size, self.image_size, dtype=torch.uint8)
        ids = torch.empty(pairs, self.context_length, dtype=torch.int64)
        if isinstance(self.model, Captioner):
            return pixels, ids
        return pixels, TokenIds(ids, np.full(pairs, tokens or self.context_length))

    def typical_tokens(self, caption_tokens: int) -> int:
        """Tokens that a text goes through the tower with: its own, rounded up, where the tower cuts texts."""
        multiple = getattr(self.model.text, "length_multiple", None)
        if multiple is None or not hasattr(self.model.text, "measure"):
            return self.context_length
        return min(-(-caption_tokens // multiple) * multiple, self.context_length)

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        """Through everything that learns."""
        wanted = [x.float().sum() for x in outputs if x.requires_grad]
        with explained_recomputation():
            if wanted:
                torch.stack(wanted).sum().backward()

    def count_flops(self, tokens: int | None = None, float8: Sequence[str] = ()) -> Flops:
        """Of one pair whose text has so many tokens (the whole context if None).

        Args:
            float8: names of layers that compute so.
        """
        self.model.train()
        with self.fake(), self.autocast():
            with FlopCounterMode(display=False, custom_mapping=COUNTS) as forward:
                outputs = self.model(*self.inputs(2, tokens))  # two, as batch norms refuse one
            with FlopCounterMode(display=False, custom_mapping=COUNTS) as backward:
                self.backward(outputs)
        for parameter in self.model.parameters():
            parameter.grad = None
        counts, root = forward.get_flop_counts(), type(self.model).__name__
        by_part = {name: sum(counts[f"{root}.{name}"].values()) / 2 for name in self.parts}
        rest = forward.get_total_flops() / 2 - sum(by_part.values())
        training = (forward.get_total_flops() + backward.get_total_flops()) / 2
        in_float8 = sum(sum(counts.get(f"{root}.{name}", {}).values()) for name in float8) / 2
        return Flops(by_part | ({OTHER: rest} if rest else {}), training, in_float8)


def _convolution_backward(
    grad: torch.Size, x: torch.Size, weight: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """As much for the pixels, if they get a gradient, and for the weights as forward; torch's own ignores groups."""
    transposed, output_mask = args[4], args[-1]
    return conv_flop_count(list(x), list(weight), list(grad), transposed) * sum(output_mask[:2])


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# For FlopCounterMode's custom_mapping. torch 2.11 does not count a CPU's attention.
COUNTS = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _without_weights(tower: Mapping[str, Any]) -> dict[str, Any]:
    return {**tower, "pretrained": False} if "pretrained" in tower else dict(tower)


def _make_fake(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Put fake tensors in place of those on the meta device; what two modules share they share again."""
    known: dict[int, Tensor] = {}

    def fake(name: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            converts = dtype is not None and tensor.is_floating_point() and name not in _KEPT_SCALARS
            empty = torch.empty(tensor.shape, dtype=dtype if converts else tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return known[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(name, tensor)  # pyright: ignore[reportArgumentType]


class _KeepAll(TorchDispatchMode):
    """Answers what depends on numbers that are not there: of a mask, that everything is kept."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            indices = [index for index in args[1] if index is not None]
            if len(indices) == 1 and indices[0].dtype == torch.bool:
                mask, target = indices[0], args[0]
                if func.overloadpacket == torch.ops.aten.index:
                    return target.reshape(mask.numel(), *target.shape[mask.ndim :]).clone()
                values = args[2].expand(mask.numel(), *target.shape[mask.ndim :]).reshape(target.shape)
                return target.copy_(values) if func.overloadpacket == torch.ops.aten.index_put_ else values.clone()
        return func(*args, **(kwargs or {}))
