"""What is done to the pixels of a batch: rounded once, before the first product copies them; nothing in backward."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clip_train.models import DualEncoder, create_dual_encoder
from tests.models.test_dual_encoder import TINY

aten = torch.ops.aten
VISIONS = {"patches": TINY["vision"], "convolution": {"name": "convnext_atto"}}


class Operators(TorchDispatchMode):
    """Keeps the operators that are called, with their arguments and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.called.append((func, args, out))
        return out

    def written(self, numel: int) -> list[torch.dtype]:
        """Types of the tensors of so many numbers that were computed or copied."""
        made = [(func, x) for func, _, out in self.called for x in tree_leaves(out) if isinstance(x, Tensor)]
        return [x.dtype for func, x in made if x.numel() == numel and not (func.is_view or _allocates(func))]


def _allocates(func: Any) -> bool:
    return func.overloadpacket in (aten.empty_like, aten.empty, aten._unsafe_view)


def model_of(vision: str) -> DualEncoder:
    torch.manual_seed(0)
    return create_dual_encoder(**{**TINY, "quick_gelu": vision == "patches", "vision": VISIONS[vision]})


def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_they_are_normalised_in_fp32_and_rounded_once(dtype, layout):
    model, pixels = model_of("patches"), pictures().contiguous(memory_format=layout)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = model.normalised(pixels)
    assert torch.equal(found, ((pixels.float() - model.image_mean) / model.image_std).to(dtype))
    assert found.dtype == dtype and found.is_contiguous(memory_format=layout)
    assert model.normalised(found) is found


def test_under_autocast_they_are_copied_in_the_type_of_the_product():
    model, pixels = model_of("patches"), pictures()
    with torch.autocast("cpu", torch.bfloat16), Operators() as operators:
        model.encode_image(pixels)
    # Converted, less their mean, over their deviation, in place; then rounded, and patch by patch.
    assert operators.written(pixels.numel()) == 3 * [torch.float32] + 2 * [torch.bfloat16]


@pytest.mark.parametrize("vision", VISIONS)
def test_backward_makes_no_gradient_of_them(vision):
    model, pixels = model_of(vision), pictures()
    assert _products_for_pixels(model, pixels) == 0
    # Those who ask for it, as saliency maps do, get it.
    assert _products_for_pixels(model, model.normalised(pixels).requires_grad_()) == 1


def _products_for_pixels(model: DualEncoder, pixels: Tensor) -> int:
    """How many operators of backward make a gradient of the first layer's input."""
    features = model.encode_image(pixels)
    with Operators() as operators:
        features.sum().backward()
    count = 0
    for func, args, out in operators.called:
        if func.overloadpacket is aten.convolution_backward and args[2].shape[1] == 3:
            count += args[10][0]
        if func.overloadpacket in (aten.mm, aten.bmm, aten.addmm):
            count += out.numel() == pixels.numel()
    return count
