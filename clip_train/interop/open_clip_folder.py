"""A model as a folder that open_clip loads with `local-dir:`: config, weights, and a tokenizer that is not CLIP's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from clip_train.errors import ConfigError
from clip_train.interop import open_clip
from clip_train.interop.architecture import TransformerSize, patched_image, text_size, vision_transformer_size
from clip_train.interop.model_source import ModelSource
from clip_train.interop.tokenizer_files import write_tokenizer
from clip_train.models.attentional_pooler import PooledVisionTower
from clip_train.models.captioner import Captioner
from clip_train.models.decoder import Block
from clip_train.models.text_config import TextConfig

_OTHERS = "take format=safetensors or onnx"
_SAME_NAMES = {"logit_scale", "logit_bias", "text.cls_emb"}
_NORM_EPS = 1e-5  # open_clip's, unless its config says another
# Options of a timm model that training sees, or that are said elsewhere in open_clip's config.
_HARMLESS = {"num_classes", "weight_init", "fix_init"}


def write_open_clip_folder(source: ModelSource, folder: Path) -> None:
    """Fill a folder with what `open_clip.create_model_from_pretrained` and `get_tokenizer` read.

    Raises:
        ConfigError: open_clip has no such model.
    """
    weights = source.model.state_dict()
    tensors = open_clip.from_ours(weights)
    if left := sorted(tensors.keys() & (weights.keys() - _SAME_NAMES)):
        raise ConfigError(f"open_clip's models have no counterpart of {left[0]} (and {len(left) - 1} more): {_OTHERS}")
    config = {"model_cfg": model_config(source), "preprocess_cfg": _preprocess_config(source)}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "open_clip_model.safetensors", {"format": "pt"})
    if TextConfig.of(source.config["text"]).tokenizer_name != "clip":
        write_tokenizer(source.config["text"], folder)


def model_config(source: ModelSource) -> dict[str, Any]:
    """open_clip's config of the model.

    Raises:
        ConfigError: it has no words for it.
    """
    names = source.model.state_dict().keys()
    vision_kind, text_kind = open_clip.vision_kind(names), open_clip.text_kind(names)
    if text_kind == "hugging_face":
        raise ConfigError(
            f"open_clip would fetch a text encoder of transformers from the Hub, not from a folder: {_OTHERS}"
        )
    text = text_size(source.model.text.trunk)
    quick_gelu = text.activation == "quick_gelu"
    config: dict[str, Any] = {
        "embed_dim": source.embed_dim,
        "vision_cfg": _VISION_CONFIGS[vision_kind](source, quick_gelu),
        "text_cfg": _text_config(source, text),
    }
    if quick_gelu:
        config["quick_gelu"] = True
    if text_kind == "custom":
        config["custom_text"] = True
    if isinstance(source.model, Captioner):
        config["multimodal_cfg"] = _multimodal_config(source.model, config["text_cfg"])
    if source.model.logit_bias is not None:
        config["init_logit_bias"] = float(source.model.logit_bias)
    return config


def _vision_transformer_config(source: ModelSource, quick_gelu: bool) -> dict[str, Any]:
    trunk = source.model.vision.trunk
    if not isinstance(trunk, VisionTransformer) or trunk.global_pool != "token":
        raise ConfigError(f"open_clip's vision transformer takes the class token, {source.vision_name} not: {_OTHERS}")
    return _vision_transformer_size(trunk, quick_gelu)


def _pooled_vision_transformer_config(source: ModelSource, quick_gelu: bool) -> dict[str, Any]:
    tower = source.model.vision
    assert isinstance(tower, PooledVisionTower) and isinstance(tower.trunk, VisionTransformer)
    config = _vision_transformer_size(tower.trunk, quick_gelu)
    if not tower.trunk.has_class_token or "norm_kwargs" in config:
        raise ConfigError(
            f"open_clip's CoCa has a class token and norms of its own, {source.vision_name} not: {_OTHERS}"
        )
    return {
        **config,
        "attentional_pool": True,
        "attn_pooler_queries": len(tower.pooler.query),
        "attn_pooler_heads": tower.pooler.attn.num_heads,
        "output_tokens": True,
    }


def _vision_transformer_size(trunk: VisionTransformer, quick_gelu: bool) -> dict[str, Any]:
    size, image = vision_transformer_size(trunk), patched_image(trunk)
    if (size.activation == "quick_gelu") != quick_gelu:
        raise ConfigError(f"open_clip's towers have QuickGELU both or neither: {_OTHERS}")
    return {
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "width": size.width,
        "layers": size.layers,
        "head_width": size.width // size.heads,
        **_block_config(size),
    }


def _resnet_config(source: ModelSource, quick_gelu: bool) -> dict[str, Any]:
    trunk = source.model.vision.trunk
    width: int = trunk.stages[0][0].conv1_1x1.conv.out_channels  # pyright: ignore
    return {
        "image_size": source.image_size,
        "layers": [len(stage) for stage in trunk.stages],  # pyright: ignore
        "width": width,
        "head_width": 32 * width // trunk.head.num_heads,  # pyright: ignore
        "patch_size": None,
    }


def _timm_config(source: ModelSource, quick_gelu: bool) -> dict[str, Any]:
    """Of a model that open_clip makes by timm's name, and can give no further options.

    Raises:
        ConfigError: it would be made with other ones than ours.
    """
    vision, trunk = source.config["vision"], source.model.vision.trunk
    options = [key for key in vision.get("options") or {} if key not in _HARMLESS and not key.startswith("drop")]
    if options or quick_gelu:
        changed = ", ".join(options) or "quick_gelu"
        raise ConfigError(f"open_clip makes {vision['name']} without options, this one has {changed}: {_OTHERS}")
    default_size = trunk.default_cfg["input_size"][-1]  # pyright: ignore
    if hasattr(trunk, "pos_embed") and default_size != source.image_size:
        raise ConfigError(
            f"open_clip makes {vision['name']} for {default_size} pixels, this one has {source.image_size}: {_OTHERS}"
        )
    names = source.model.state_dict().keys()
    projection = "none"
    if "vision.projection.weight" in names:
        projection = "linear"
    elif "vision.projection.0.weight" in names:
        projection = "mlp"
    elif getattr(trunk, "num_classes", 0):
        projection = ""  # the trunk's own last layer
    pool = getattr(trunk, "global_pool", "")
    return {
        "image_size": source.image_size,
        "timm_model_name": vision["name"],
        "timm_model_pretrained": False,
        "timm_pool": pool if isinstance(pool, str) else "",
        "timm_proj": projection,
        "timm_proj_bias": bool({"vision.projection.bias", "vision.projection.2.bias"} & names),
    }


_VISION_CONFIGS = {
    "clip": _vision_transformer_config,
    "pooled": _pooled_vision_transformer_config,
    "resnet": _resnet_config,
    "timm": _timm_config,
}


def _text_config(source: ModelSource, size: TransformerSize) -> dict[str, Any]:
    text, trunk = source.config["text"], source.model.text.trunk
    config: dict[str, Any] = {
        "context_length": trunk.config.max_position_embeddings,
        "vocab_size": trunk.config.vocab_size,
        "width": size.width,
        "layers": size.layers,
        "heads": size.heads,
        **_block_config(size),
    }
    if isinstance(source.model, Captioner):
        config |= {"context_length": source.model.text.context_length, "embed_cls": True, "output_tokens": True}
    if trunk.config.model_type == "siglip_text_model":
        config |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    if TextConfig.of(text).tokenizer_name != "clip":
        config |= {
            "hf_tokenizer_name": TextConfig.of(text).tokenizer_name,
            "tokenizer_kwargs": {"clean": text.get("clean", "whitespace")},
        }
    return config


def _multimodal_config(model: Captioner, text: Mapping[str, Any]) -> dict[str, Any]:
    decoder = model.decoder
    block = decoder.self_blocks[0]
    assert isinstance(block, Block)
    hidden: int = block.mlp.fc1.out_features  # pyright: ignore
    ratio = hidden / decoder.head.in_features
    return {
        **{key: text[key] for key in ("context_length", "vocab_size", "width")},
        "heads": block.attn.num_heads,
        "layers": len(decoder.self_blocks),
        "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
        "attn_pooler_heads": model.vision.pooler.attn.num_heads,
    }


def _block_config(size: TransformerSize) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if size.mlp_width != 4 * size.width:
        ratio = size.mlp_width / size.width
        # open_clip rounds the product down; half a unit more than the quotient cannot fall short.
        config["mlp_ratio"] = (
            ratio if int(size.width * ratio) == size.mlp_width else (size.mlp_width + 0.5) / size.width
        )
    if size.norm_eps != _NORM_EPS:
        config["norm_kwargs"] = {"eps": size.norm_eps}
    if size.activation == "gelu_pytorch_tanh":
        config["act_kwargs"] = {"approximate": "tanh"}
    return config


def _preprocess_config(source: ModelSource) -> dict[str, Any]:
    return {
        "mean": list(source.image_mean),
        "std": list(source.image_std),
        "interpolation": source.interpolation,
        "resize_mode": source.resize_mode,
    }
