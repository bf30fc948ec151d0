"""The layouts of transformers' `CLIPModel` and `SiglipModel`."""

from collections.abc import Mapping

from torch import Tensor

from clip_train.interop.renaming import Fusion, Layout, Row

_IGNORED = ("**.position_ids",)

_TEXT = Row("text.trunk.**", "text_model.**")

_VISION_BLOCKS = (
    Row("vision.trunk.blocks.*.norm1.*", "vision_model.encoder.layers.*.layer_norm1.*"),
    Row("vision.trunk.blocks.*.norm2.*", "vision_model.encoder.layers.*.layer_norm2.*"),
    Row("vision.trunk.blocks.*.attn.proj.*", "vision_model.encoder.layers.*.self_attn.out_proj.*"),
    Row("vision.trunk.blocks.*.attn.*.*", "vision_model.encoder.layers.*.self_attn.*.*"),
    Row("vision.trunk.blocks.*.mlp.*.*", "vision_model.encoder.layers.*.mlp.*.*"),
    Row("vision.trunk.norm.*", "vision_model.post_layernorm.*"),
)
_POSITIONS = Row(
    "vision.trunk.pos_embed", "vision_model.embeddings.position_embedding.weight", lambda w: w[None], lambda w: w[0]
)
_QKV = Fusion("vision.trunk.blocks.*.attn.qkv.*", tuple(f"vision.trunk.blocks.*.attn.{part}_proj.*" for part in "qkv"))

_CLIP = Layout(
    rows=(
        Row("logit_scale", "logit_scale", lambda w: w.reshape(())),
        _TEXT,
        Row("text.projection.weight", "text_projection.weight"),
        Row(
            "vision.trunk.cls_token",
            "vision_model.embeddings.class_embedding",
            lambda w: w.view(1, 1, -1),
            lambda w: w.view(-1),
        ),
        Row("vision.trunk.patch_embed.proj.weight", "vision_model.embeddings.patch_embedding.weight"),
        _POSITIONS,
        Row("vision.trunk.norm_pre.*", "vision_model.pre_layrnorm.*"),
        *_VISION_BLOCKS,
        Row("vision.projection.weight", "visual_projection.weight"),
    ),
    fused_ours=(_QKV,),
    ignored=_IGNORED,
)

_POOL, _ATTENTION = "vision.trunk.attn_pool.", "vision_model.head.attention."
_SIGLIP = Layout(
    rows=(
        Row("logit_scale", "logit_scale", lambda w: w.reshape(()), lambda w: w.reshape(1)),
        Row("logit_bias", "logit_bias", lambda w: w.reshape(()), lambda w: w.reshape(1)),
        _TEXT,
        Row("vision.trunk.patch_embed.proj.*", "vision_model.embeddings.patch_embedding.*"),
        _POSITIONS,
        *_VISION_BLOCKS,
        Row(f"{_POOL}latent", "vision_model.head.probe"),
        Row(f"{_POOL}q.*", f"{_ATTENTION}q_proj.*"),
        Row(f"{_POOL}kv.*", f"{_ATTENTION}kv_proj.*"),
        Row(f"{_POOL}proj.*", f"{_ATTENTION}out_proj.*"),
        Row(f"{_POOL}norm.*", "vision_model.head.layernorm.*"),
        Row(f"{_POOL}mlp.*.*", "vision_model.head.mlp.*.*"),
    ),
    # timm has the queries' matrix beside one for keys and values, torch all three in one.
    fused_theirs=(Fusion(f"{_ATTENTION}in_proj_*", (f"{_ATTENTION}q_proj.*", f"{_ATTENTION}kv_proj.*"), (1, 2)),),
    fused_ours=(_QKV,),
    ignored=_IGNORED,
)


def to_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `CLIPModel` or `SiglipModel` under our names; what has no place there keeps its name."""
    return (_SIGLIP if "vision_model.head.probe" in weights else _CLIP).to_ours(weights)


def from_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names of `CLIPModel`, or of `SiglipModel` for an image tower with attention pooling."""
    return (_SIGLIP if f"{_POOL}latent" in weights else _CLIP).from_ours(weights)
