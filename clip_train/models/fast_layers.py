"""Layers of timm and transformers, computed faster: the same weights, and the same results to rounding."""

from typing import Any

import torch
from jaxtyping import Float
from timm.layers import PatchEmbed
from timm.layers.activations import QuickGELU as TimmQuickGELU
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import QuickGELUActivation


class PatchProjection(nn.Conv2d):
    """A convolution whose patches do not overlap, as a product of matrices.

    The backward of the convolution takes an eighth of a ViT-B/32's step on a processor.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "PatchProjection":
        """With the weights of another."""
        size = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
        made = cls(*size, bias=conv.bias is not None, device="meta").train(conv.training)  # pyright: ignore
        made.weight, made.bias = conv.weight, conv.bias
        return made

    def forward(self, input: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b width rows columns"]:
        (high, wide), (height, width) = self.kernel_size, input.shape[2:]
        last = input.is_contiguous(memory_format=torch.channels_last)
        input = input[:, :, : height // high * high, : width // wide * wide]  # what is over belongs to no patch
        # The numbers of a patch lie in the order in which the picture has them: what is copied is in runs.
        if last:
            pixels = input.permute(0, 2, 3, 1).unflatten(2, (-1, wide)).unflatten(1, (-1, high))
            rows, weight = pixels.permute(0, 1, 3, 2, 4, 5), self.weight.permute(0, 2, 3, 1)
        else:
            pixels = input.unflatten(3, (-1, wide)).unflatten(2, (-1, high))
            rows, weight = pixels.permute(0, 2, 4, 1, 3, 5), self.weight
        return F.linear(rows.flatten(3), weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), OpenAI's activation, as silu(1.702 x) / 1.702: one tensor is kept for backward, not two."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which makes one kernel of it
            return F.silu(1.702 * input) * (1 / 1.702)
        if input.requires_grad:
            return _ScaledSilu.apply(input)
        return F.silu(1.702 * input, inplace=True).mul_(1 / 1.702)


class _ScaledSilu(torch.autograd.Function):
    """Its derivative is that of silu at 1.702 x, without a factor."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        scaled = 1.702 * input
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(grads[0], *ctx.saved_tensors)


def use_fast_layers(trunk: nn.Module) -> nn.Module:
    """Put them in place of others in a transformer; returns it."""
    for module in trunk.modules():
        for name, child in module.named_children():
            if isinstance(child, TimmQuickGELU | QuickGELUActivation):
                setattr(module, name, QuickGELU())
        if isinstance(module, PatchEmbed) and _is_patchwise(module.proj):
            module.proj = PatchProjection.of(module.proj)
    return trunk


def _is_patchwise(conv: nn.Module) -> bool:
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != conv.stride or conv.groups != 1:
        return False
    return conv.padding in ((0, 0), "valid") and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
