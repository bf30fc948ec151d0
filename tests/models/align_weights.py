"""Weights of transformers' ALIGN under our names."""

import re

import timm
import torch
from torch import Tensor

_LAYERS = {
    "depthwise_conv.depthwise_conv": "conv_dw",
    "squeeze_excite.reduce": "se.conv_reduce",
    "squeeze_excite.expand": "se.conv_expand",
}
# The stages that widen first, and the first, which does not.
_WIDENING = {
    "expansion.expand_conv": "conv_pw",
    "expansion.expand_bn": "bn1",
    "depthwise_conv.depthwise_norm": "bn2",
    "projection.project_conv": "conv_pwl",
    "projection.project_bn": "bn3",
}
_FIRST = {
    "depthwise_conv.depthwise_norm": "bn1",
    "projection.project_conv": "conv_pw",
    "projection.project_bn": "bn2",
}


def from_align(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of `AlignModel`; the text model's pooler is left out."""
    with torch.device("meta"):
        stages = timm.create_model("tf_efficientnet_b7").blocks
    blocks = [(i, j) for i, stage in enumerate(stages) for j in range(len(stage))]  # pyright: ignore
    ours = {"logit_scale": weights["temperature"].reciprocal().log()}
    for name, weight in weights.items():
        if name.startswith("text_model.") and ".pooler." not in name:
            ours[name.replace("text_model.", "text.trunk.")] = weight
        elif name.startswith("text_projection."):
            ours[name.replace("text_projection", "text.projection")] = weight
        elif name.startswith("vision_model.embeddings."):
            layer = name.rpartition(".")[2]
            ours[f"vision.trunk.{'conv_stem' if 'convolution' in name else 'bn1'}.{layer}"] = weight
        elif found := re.match(r"vision_model\.encoder\.blocks\.(\d+)\.(.+)\.(\w+)$", name):
            stage, block = blocks[int(found[1])]
            layer = ({**_LAYERS, **(_WIDENING if stage else _FIRST)})[found[2]]
            ours[f"vision.trunk.blocks.{stage}.{block}.{layer}.{found[3]}"] = weight
    return ours
