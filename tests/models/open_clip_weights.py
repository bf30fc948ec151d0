"""open_clip's weights under our names."""

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
    "logit_scale": ("logit_scale", None),
}
_PREFIXES = {
    "visual.ln_pre.": "vision.trunk.norm_pre.",
    "visual.ln_post.": "vision.trunk.norm.",
    "ln_final.": "text.trunk.final_layer_norm.",
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


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape a state dict of open_clip's `CLIP`."""
    ours: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name in _RENAMED:
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
            ours[name.replace(prefix, _PREFIXES[prefix])] = weight
    return ours


def _replace(name: str, parts: dict[str, str]) -> str:
    old = next(part for part in parts if part in name)
    return name.replace(old, parts[old])
