"""A model as one file that OpenAI's `clip.load` reads: a state dict from whose shapes it tells the architecture."""

from pathlib import Path

import torch

from clip_train.data.files import whole_file
from clip_train.errors import ConfigError
from clip_train.interop import openai
from clip_train.interop.model_source import ModelSource
from clip_train.interop.open_clip_folder import model_config

_HEAD_WIDTH = 64  # of all of OpenAI's models


def write_openai_file(source: ModelSource, path: Path) -> None:
    """Write the file.

    Raises:
        ConfigError: OpenAI's code could not tell the architecture, or has no such one.
        OSError: it cannot be written.
    """
    config = model_config(source)
    vision, text = config["vision_cfg"], config["text_cfg"]
    differs = {
        "its image tower is one of timm": "timm_model_name" in vision,
        "its text tower is not CLIP's": "custom_text" in config,
        "it has a bias of the logits": "init_logit_bias" in config,
        "its activation is not QuickGELU": not config.get("quick_gelu"),
        "its heads are not 64 wide": not vision.get("head_width") == text["width"] // text["heads"] == _HEAD_WIDTH,
        "its layers are of another kind": bool({"mlp_ratio", "norm_kwargs"} & {*vision, *text}),
    }
    if reason := next((reason for reason, true in differs.items() if true), None):
        raise ConfigError(f"OpenAI's code cannot make this model, as {reason}: take format=open_clip")
    with whole_file(path) as file:
        torch.save(openai.from_ours(source.model.state_dict(), source.image_size), file)
