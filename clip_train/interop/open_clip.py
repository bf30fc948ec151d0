"""The layouts of open_clip, which are also those of OpenAI's CLIP.

An image tower is open_clip's own vision transformer (`visual.transformer`), its ResNet (`visual.layer1`), or a timm
model (`visual.trunk`). A text tower lies bare (`transformer.resblocks`), or in a module (`text.transformer`),
where it may be one of transformers' models too. CoCa adds a pooler (`visual.attn_pool`) and a decoder (`text_decoder`).
"""

from collections.abc import Collection, Mapping

from torch import Tensor

from clip_train.interop.renaming import Fusion, Layout, Row

_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# Constants that TorchScript archives and older versions keep beside the weights.
_IGNORED = (*_OPENAI_EXTRAS, "attn_mask", "**.attn_mask", "**.position_ids")


def _transposed(weight: Tensor) -> Tensor:
    return weight.T.contiguous()


_LOGITS = (
    Row("logit_scale", "logit_scale", lambda w: w.reshape(())),
    Row("logit_bias", "logit_bias", lambda w: w.reshape(())),
)

_VISION_TRANSFORMER = (
    Row("vision.trunk.cls_token", "visual.class_embedding", lambda w: w.view(1, 1, -1), lambda w: w.view(-1)),
    Row("vision.trunk.pos_embed", "visual.positional_embedding", lambda w: w[None], lambda w: w[0]),
    Row("vision.trunk.patch_embed.proj.weight", "visual.conv1.weight"),
    Row("vision.trunk.norm_pre.*", "visual.ln_pre.*"),
    Row("vision.trunk.blocks.*.norm1.*", "visual.transformer.resblocks.*.ln_1.*"),
    Row("vision.trunk.blocks.*.norm2.*", "visual.transformer.resblocks.*.ln_2.*"),
    Row("vision.trunk.blocks.*.attn.qkv.*", "visual.transformer.resblocks.*.attn.in_proj_*"),
    Row("vision.trunk.blocks.*.attn.proj.*", "visual.transformer.resblocks.*.attn.out_proj.*"),
    Row("vision.trunk.blocks.*.mlp.fc1.*", "visual.transformer.resblocks.*.mlp.c_fc.*"),
    Row("vision.trunk.blocks.*.mlp.fc2.*", "visual.transformer.resblocks.*.mlp.c_proj.*"),
    Row("vision.trunk.norm.*", "visual.ln_post.*"),
    Row("vision.projection.weight", "visual.proj", _transposed, _transposed),
)

_POOLED_VISION_TRANSFORMER = (
    Row("vision.pooler.query", "visual.attn_pool.query"),
    Row("vision.pooler.norm_query.*", "visual.attn_pool.ln_q.*"),
    Row("vision.pooler.norm_context.*", "visual.attn_pool.ln_k.*"),
    Row("vision.pooler.attn.**", "visual.attn_pool.attn.**"),
    Row("vision.norm.*", "visual.ln_post.*"),
    *(row for row in _VISION_TRANSFORMER if row.theirs != "visual.ln_post.*"),
)

_RESNET = (
    Row("vision.trunk.stem.conv1.conv.weight", "visual.conv1.weight"),
    Row("vision.trunk.stem.conv2.conv.weight", "visual.conv2.weight"),
    Row("vision.trunk.stem.conv3.conv.weight", "visual.conv3.weight"),
    Row("vision.trunk.stem.conv1.bn.*", "visual.bn1.*"),
    Row("vision.trunk.stem.conv2.bn.*", "visual.bn2.*"),
    Row("vision.trunk.stem.conv3.bn.*", "visual.bn3.*"),
    *(
        Row(f"vision.trunk.stages.{stage}.*.{ours}.*", f"visual.layer{stage + 1}.*.{theirs}.*")
        for stage in range(4)
        for ours, theirs in (
            ("conv1_1x1.conv", "conv1"),
            ("conv1_1x1.bn", "bn1"),
            ("conv2_kxk.conv", "conv2"),
            ("conv2_kxk.bn", "bn2"),
            ("conv3_1x1.conv", "conv3"),
            ("conv3_1x1.bn", "bn3"),
            ("shortcut.conv.conv", "downsample.0"),
            ("shortcut.conv.bn", "downsample.1"),
        )
    ),
    Row("vision.trunk.head.pos_embed", "visual.attnpool.positional_embedding"),
    Row("vision.trunk.head.q.*", "visual.attnpool.q_proj.*"),
    Row("vision.trunk.head.k.*", "visual.attnpool.k_proj.*"),
    Row("vision.trunk.head.v.*", "visual.attnpool.v_proj.*"),
    Row("vision.trunk.head.proj.*", "visual.attnpool.c_proj.*"),
)

_TIMM_MODEL = (
    Row("vision.trunk.**", "visual.trunk.**"),
    Row("vision.projection.weight", "visual.head.proj.weight"),
    Row("vision.projection.bias", "visual.head.proj.bias"),
    Row("vision.projection.0.*", "visual.head.mlp.fc1.*"),
    Row("vision.projection.2.*", "visual.head.mlp.fc2.*"),
)

_TEXT_TRANSFORMER = (
    Row("text.trunk.embeddings.position_embedding.weight", "positional_embedding"),
    Row("text.trunk.embeddings.token_embedding.weight", "token_embedding.weight"),
    Row("text.trunk.encoder.layers.*.layer_norm1.*", "transformer.resblocks.*.ln_1.*"),
    Row("text.trunk.encoder.layers.*.layer_norm2.*", "transformer.resblocks.*.ln_2.*"),
    Row("text.trunk.encoder.layers.*.self_attn.*.*", "transformer.resblocks.*.attn.*.*"),
    Row("text.trunk.encoder.layers.*.mlp.fc1.*", "transformer.resblocks.*.mlp.c_fc.*"),
    Row("text.trunk.encoder.layers.*.mlp.fc2.*", "transformer.resblocks.*.mlp.c_proj.*"),
    Row("text.trunk.final_layer_norm.*", "ln_final.*"),
    Row("text.projection.weight", "text_projection", _transposed, _transposed),
    Row("text.trunk.head.*", "text_projection.*"),  # SigLIP's is a linear layer with a bias
)

_DECODER = (
    *(
        Row(f"decoder.{ours}.*.{part_of_ours}.**", f"text_decoder.{theirs}.*.{part_of_theirs}.**")
        for ours, theirs in (("self_blocks", "resblocks"), ("cross_blocks", "cross_attn"))
        for part_of_ours, part_of_theirs in (
            ("norm1", "ln_1"),
            ("norm_context", "ln_1_kv"),
            ("attn", "attn"),
            ("norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        )
    ),
    Row("decoder.norm.*", "text_decoder.ln_final.*"),
    Row("decoder.head.weight", "text_decoder.text_projection", _transposed, _transposed),
)

_HUGGING_FACE_TEXT = (
    Row("text.trunk.**", "text.transformer.**"),
    Row("text.projection.weight", "text.proj.weight"),
    Row("text.projection.*.weight", "text.proj.*.weight"),
)


def _text_transformer(prefix: str) -> tuple[tuple[Row, ...], tuple[Fusion, ...]]:
    rows = tuple(Row(r.ours, prefix + r.theirs, r.to_ours, r.to_theirs) for r in _TEXT_TRANSFORMER)
    block = f"{prefix}transformer.resblocks.*.attn."
    return rows, (Fusion(f"{block}in_proj_*", tuple(f"{block}{part}_proj.*" for part in "qkv")),)


_VISION = {
    "clip": _VISION_TRANSFORMER,
    "pooled": _POOLED_VISION_TRANSFORMER,
    "resnet": _RESNET,
    "timm": _TIMM_MODEL,
}
_TEXT = {
    "clip": _text_transformer(""),
    "custom": _text_transformer("text."),
    "hugging_face": (_HUGGING_FACE_TEXT, ()),
}
_LAYOUTS = {
    (vision, text): Layout((*vision_rows, *text_rows, *_DECODER, *_LOGITS), fused_theirs=fusions, ignored=_IGNORED)
    for vision, vision_rows in _VISION.items()
    for text, (text_rows, fusions) in _TEXT.items()
}


def to_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip, or of OpenAI's CLIP, under our names; what has no place there keeps its name."""
    names = weights.keys()
    text = "clip"
    if "text.token_embedding.weight" in names:
        text = "custom"
    elif any(name.startswith("text.transformer.") for name in names):
        text = "hugging_face"
    vision = "clip"
    if any(name.startswith("visual.trunk.") for name in names):
        vision = "timm"
    elif any(name.startswith("visual.layer1.") for name in names):
        vision = "resnet"
    elif "visual.attn_pool.query" in names:
        vision = "pooled"
    return _LAYOUTS[vision, text].to_ours(weights)


def from_ours(weights: Mapping[str, Tensor], custom_text: bool = False) -> dict[str, Tensor]:
    """Our state dict under the names of open_clip.

    Args:
        weights: the model's.
        custom_text: the text tower in a module of its own, as open_clip has it under `custom_text: true`.
    """
    return _LAYOUTS[vision_kind(weights), text_kind(weights, custom_text)].from_ours(weights)


def vision_kind(names: Collection[str] | Mapping[str, Tensor]) -> str:
    """Which of open_clip's image towers holds our weights: `clip`, `pooled` (CoCa's), `resnet` or `timm`."""
    if "vision.pooler.query" in names:
        return "pooled"
    if "vision.trunk.stages.0.0.conv1_1x1.conv.weight" in names and "vision.trunk.head.q.weight" in names:
        return "resnet"
    plain = {"cls_token", "norm_pre.weight", "norm.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"}
    own = all(f"vision.trunk.{name}" in names for name in plain) and "vision.projection.weight" in names
    extra = {"patch_embed.proj.bias", "attn_pool.latent", "blocks.0.ls1.gamma"}
    return "clip" if own and not any(f"vision.trunk.{name}" in names for name in extra) else "timm"


def text_kind(names: Collection[str] | Mapping[str, Tensor], custom_text: bool = False) -> str:
    """Which of open_clip's text towers holds our weights: `clip`, `custom` or `hugging_face`."""
    if "text.trunk.embeddings.token_embedding.weight" not in names:
        return "hugging_face"
    own_module = {"text.trunk.head.weight", "text.cls_emb"}  # SigLIP's and CoCa's, always
    return "custom" if custom_text or any(name in names for name in own_module) else "clip"
