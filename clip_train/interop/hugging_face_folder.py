"""A model as a folder that transformers loads: configs, weights, tokenizer, preparation of pictures."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from clip_train.checkpoints.choice import weight_differences
from clip_train.errors import ConfigError
from clip_train.interop import hugging_face
from clip_train.interop.architecture import patched_image, vision_transformer_size
from clip_train.interop.model_source import ModelSource
from clip_train.interop.tokenizer_files import write_tokenizer
from clip_train.models.captioner import Captioner

_OTHERS = "take format=open_clip, safetensors or onnx"
_RESAMPLE = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers


def write_hugging_face_folder(source: ModelSource, folder: Path) -> None:
    """Fill a folder with what `AutoModel` and `AutoProcessor` read.

    Raises:
        ConfigError: neither `CLIPModel` nor `SiglipModel` can hold the model.
    """
    from transformers import CLIPModel, SiglipModel

    if isinstance(source.model, Captioner):
        raise ConfigError(f"transformers has no CoCa: {_OTHERS}")
    tensors = hugging_face.from_ours(source.model.state_dict())
    config = _siglip_config(source) if "vision_model.head.probe" in tensors else _clip_config(source)
    model_class: Any = SiglipModel if config.model_type == "siglip" else CLIPModel
    with torch.device("meta"):
        reference = model_class(config)
    _check_same(reference, tensors, model_class.__name__)
    config.architectures = [model_class.__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    write_processor(source, folder)


def write_processor(source: ModelSource, folder: Path) -> None:
    """The preparation of pictures and the tokenizer, for `AutoProcessor`.

    Raises:
        ConfigError: transformers cannot prepare pictures so.
    """
    siglip = source.model.text.trunk.config.model_type == "siglip_text_model"
    pictures = _image_processor(source, "SiglipImageProcessor" if siglip else "CLIPImageProcessor")
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures, indent=2) + "\n")
    processor = {"processor_class": "SiglipProcessor" if siglip else "CLIPProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    write_tokenizer(source.config["text"], folder)


def _image_processor(source: ModelSource, processor: str) -> dict[str, Any]:
    size = source.image_size
    if source.resize_mode == "longest":
        raise ConfigError(
            "transformers' processors have no model.resize_mode=longest: take format=open_clip or safetensors"
        )
    shortest = source.resize_mode == "shortest"
    if shortest:
        processor = "CLIPImageProcessor"  # SigLIP's does not crop
    square = {"height": size, "width": size}
    crop = {"do_center_crop": True, "crop_size": square} if shortest else {"do_center_crop": False}
    return {
        "image_processor_type": processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if shortest else square,
        "resample": _RESAMPLE[source.interpolation],
        **crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(source.image_mean),
        "image_std": list(source.image_std),
    }


def _clip_config(source: ModelSource):
    from transformers import CLIPConfig

    trunk, text = _plain_trunk(source), _text_trunk(source, "clip_text_model")
    if trunk.global_pool != "token":
        raise ConfigError(f"CLIPModel takes the class token, not global_pool={trunk.global_pool}: {_OTHERS}")
    return CLIPConfig(
        text_config=text.config.to_dict(),
        vision_config={**_vision_config(trunk), "projection_dim": source.embed_dim},
        projection_dim=source.embed_dim,
    )


def _siglip_config(source: ModelSource):
    from transformers import SiglipConfig

    text = _text_trunk(source, "siglip_text_model")
    return SiglipConfig(text_config=text.config.to_dict(), vision_config=_vision_config(_plain_trunk(source)))


def _vision_config(trunk: VisionTransformer) -> dict[str, Any]:
    size, image = vision_transformer_size(trunk), patched_image(trunk)
    return {
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "hidden_act": size.activation,
        "layer_norm_eps": size.norm_eps,
        "image_size": image.image_size,
        "patch_size": image.patch_size,
    }


def _plain_trunk(source: ModelSource) -> VisionTransformer:
    trunk = source.model.vision.trunk
    if not isinstance(trunk, VisionTransformer):
        raise ConfigError(f"transformers' CLIPModel and SiglipModel have no {source.vision_name}: {_OTHERS}")
    return trunk


def _text_trunk(source: ModelSource, kind: str) -> Any:
    trunk: Any = source.model.text.trunk
    if trunk.config.model_type != kind:
        raise ConfigError(f"transformers has no such image tower beside a {trunk.config.model_type}: {_OTHERS}")
    return trunk


def _check_same(reference: nn.Module, tensors: dict[str, torch.Tensor], name: str) -> None:
    expected, found = ({key: tuple(w.shape) for key, w in side.items()} for side in (reference.state_dict(), tensors))
    if differences := weight_differences(expected, found):
        raise ConfigError(
            f"transformers' {name} cannot hold this model, as its weights differ: {differences}; {_OTHERS}"
        )
