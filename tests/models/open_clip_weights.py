"""open_clip's weights under our names."""

import re

import torch
from torch import Tensor

_RENAMED = {
    "visual.class_embedding": ("vision.trunk.cls_token", lambda w: w.view(1, 1, -1)),
    "visual.positional_embedding": ("vision.trunk.pos_embed", lambda w: w[None]),
    "visual.conv1.weight": ("vision.trunk.patch_embed.proj.weight", None),
    "visual.proj": ("vision.projection.weight", lambda w: w.T),
    "positional_embedding": ("text.trunk.embeddings.position_embedding.weight", None),
    "token_embedding.weight": ("text.trunk.embeddings.token_embedding.weight", None),
    "text_projection": ("text.projection.weight", lambda w: w.T),
    "text_projection.weight": ("text.trunk.head.weight", None),  # SigLIP's
    "text_projection.bias": ("text.trunk.head.bias", None),
    "logit_scale": ("logit_scale", None),
    "logit_bias": ("logit_bias", None),
}
_PREFIXES = {
    "visual.ln_pre.": "vision.trunk.norm_pre.",
    "visual.ln_post.": "vision.trunk.norm.",
    "ln_final.": "text.trunk.final_layer_norm.",
    "visual.trunk.": "vision.trunk.",  # timm's models
    "visual.head.proj.": "vision.projection.",
    "visual.attnpool.": "vision.trunk.head.",
    "visual.layer": "vision.trunk.stages.",
    "visual.": "vision.trunk.stem.",  # what is left of a ResNet
}
_VISION_BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TEXT_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_ATTENTION_POOL = {
    "positional_embedding": "pos_embed",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "c_proj": "proj",
}
_BOTTLENECK = {"1": "conv1_1x1", "2": "conv2_kxk", "3": "conv3_1x1"}


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape a state dict of open_clip's `CLIP` or `CustomTextCLIP`."""
    ours: dict[str, Tensor] = {}
    for name, weight in weights.items():
        name = name.removeprefix("text.")
        if name in _RENAMED and not (name == "visual.conv1.weight" and "visual.bn1.weight" in weights):  # a ResNet's
            new_name, change = _RENAMED[name]
            ours[new_name] = change(weight) if change else weight
        elif name.startswith("visual.transformer.resblocks."):
            ours["vision.trunk.blocks." + _replace(name.split("resblocks.")[1], _VISION_BLOCK)] = weight
        elif name.startswith("transformer.resblocks."):
            rest = name.split("resblocks.")[1]
            if ".in_proj_" in rest:
                block, kind = rest.split(".attn.in_proj_")
                for part, values in zip("qkv", torch.chunk(weight, 3)):
                    ours[f"text.trunk.encoder.layers.{block}.self_attn.{part}_proj.{kind}"] = values
            else:
                ours["text.trunk.encoder.layers." + _replace(rest, _TEXT_BLOCK)] = weight
        else:
            prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
            rest = name.removeprefix(prefix)
            if prefix == "visual.attnpool.":
                rest = _replace(rest, _ATTENTION_POOL)
            elif prefix in ("visual.layer", "visual."):
                rest = _resnet_layer(rest, stem=prefix == "visual.")
            ours[_PREFIXES[prefix] + rest] = weight
    return ours


def _resnet_layer(name: str, stem: bool) -> str:
    """timm's name of a layer of the stem, `conv2.weight`, or of a stage, `4.0.bn1.weight`."""
    if stem:
        return re.sub(r"^(conv|bn)(\d)\.", r"conv\2.\1.", name)
    stage, block, rest = name.split(".", 2)
    rest = rest.replace("downsample.0.", "shortcut.conv.conv.").replace("downsample.1.", "shortcut.conv.bn.")
    rest = re.sub(r"^(conv|bn)(\d)\.", lambda found: f"{_BOTTLENECK[found[2]]}.{found[1]}.", rest)
    return f"{int(stage) - 1}.{block}.{rest}"


def _replace(name: str, parts: dict[str, str]) -> str:
    old = next(part for part in parts if part in name)
    return name.replace(old, parts[old])
