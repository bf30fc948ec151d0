"""The faster layers give what those of torch, timm and transformers give, forward and backward."""

from typing import Any

import pytest
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clip_train.models import create_dual_encoder
from clip_train.models.cpu_attention import _Attention, fast_attention
from clip_train.models.fast_layers import PatchProjection, QuickGELU, use_fast_layers


def backward(module: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaf = inputs.clone().requires_grad_()
    out = module(leaf)
    return out, list(torch.autograd.grad(out.sin().sum(), [leaf, *module.parameters()]))


@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_projected_as_by_the_convolution(bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 10, (4, 8), (4, 8), bias=bias).double()
    pixels = torch.randn(2, 3, 14, 31, dtype=torch.float64)  # not a multiple of the patches
    fast = PatchProjection.of(conv)
    assert fast.weight is conv.weight and fast.state_dict().keys() == conv.state_dict().keys()
    for layout in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        (found, found_grads), (expected, expected_grads) = backward(fast, layout), backward(conv, layout)
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-13
        for one, other in zip(found_grads, expected_grads, strict=True):
            assert (one - other).abs().max() < 1e-12


def test_only_convolutions_that_do_not_overlap_are_replaced():
    patchwise, overlapping = PatchEmbed(16, 4, 3, 8), PatchEmbed(16, 4, 3, 8)
    overlapping.proj = nn.Conv2d(3, 8, 4, 4, padding=1)
    use_fast_layers(nn.ModuleList([patchwise, overlapping]))
    assert isinstance(patchwise.proj, PatchProjection)
    assert not isinstance(overlapping.proj, PatchProjection)


def test_quick_gelu_is_openais():
    x = torch.linspace(-30, 30, 301, dtype=torch.float64)

    class Reference(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.702 * x)

    (found, found_grads), (expected, expected_grads) = backward(QuickGELU(), x), backward(Reference(), x)
    assert (found - expected).abs().max() < 1e-14
    assert (found_grads[0] - expected_grads[0]).abs().max() < 1e-13


def test_models_have_them():
    options = {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1}
    text: dict[str, Any] = {"width": 64, "layers": 2, "heads": 1, "vocab_size": 100}
    vision = {"name": "vit_base_patch32_clip_224", "options": options}
    model = create_dual_encoder(embed_dim=24, image_size=32, quick_gelu=True, vision=vision, text=text)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(QuickGELU) == 4 and kinds.count(PatchProjection) == 1
    assert not {kind.__name__ for kind in kinds} & {"QuickGELUActivation", "Conv2d"}


@pytest.fixture
def instructions(monkeypatch):
    """As if this processor had those for bf16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


def attention_inputs(tokens: int) -> list[Tensor]:
    """Queries, keys and values as a fused projection gives them, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    fused = 1.5 * torch.randn(3, tokens, 3, 4, 16, generator=generator)
    return [*fused.bfloat16().permute(2, 0, 3, 1, 4), torch.randn(3, 4, tokens, 16, generator=generator).bfloat16()]


def attention_grads(inputs: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
    query, key, value = leaves
    out = F.scaled_dot_product_attention(query, key, value, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].to(dtype))]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.5}])
@pytest.mark.parametrize("tokens", [1, 9, 300])  # 300: a tile is not the whole batch
def test_attention_of_bf16_is_as_exact_as_torchs(instructions, tokens, options):
    inputs = attention_inputs(tokens)
    exact = attention_grads(inputs, torch.float64, **options)
    torchs = attention_grads(inputs, torch.bfloat16, **options)
    with fast_attention(torch.device("cpu")):
        ours = attention_grads(inputs, torch.bfloat16, **options)
    assert torch.equal(ours[0], torchs[0])
    for found, other, reference in zip(ours[1:], torchs[1:], exact[1:], strict=True):
        error = (found - reference).norm()
        assert error <= 1.2 * (other - reference).norm() + 1e-5
        assert error <= 0.01 * reference.norm() + 1e-5


@pytest.mark.parametrize("change", ["fp32", "mask", "no_grad", "cross", "strides"])
def test_other_attention_is_torchs(monkeypatch, instructions, change):
    def fail(*args: Any) -> None:
        raise AssertionError("not for this")

    monkeypatch.setattr(_Attention, "apply", fail)
    query, key, value, _ = attention_inputs(8)
    if change == "fp32":
        query, key, value = query.float(), key.float(), value.float()
    if change == "cross":
        key, value = key[:, :, :5], value[:, :, :5]
    if change == "strides":
        query, key, value = (torch.randn(3, 4, 16, 8).bfloat16().mT for _ in range(3))
    mask = torch.ones(8, 8, dtype=torch.bool) if change == "mask" else None
    query = query.detach().requires_grad_(change != "no_grad")
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with fast_attention(torch.device("cpu")):
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, attn_mask=mask), expected)


def test_it_is_for_processors_with_bf16(monkeypatch):
    calls: list[bool] = []
    monkeypatch.setattr(_Attention, "apply", lambda *args: calls.append(True) or args[0])
    query = attention_inputs(8)[0].clone().requires_grad_()
    for has in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        with fast_attention(torch.device("cpu")):
            F.scaled_dot_product_attention(query, query, query)
        assert len(calls) == 1
    F.scaled_dot_product_attention(query, query, query)
    assert len(calls) == 1


def test_attention_that_is_computed_again_has_the_same_gradients(instructions):
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value).square().sum()

    gradients = []
    for again in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in attention_inputs(9)[:3]]
        with fast_attention(torch.device("cpu")):
            total: Any = checkpoint(attend, *leaves, use_reentrant=False) if again else attend(*leaves)
            total.backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
