"""Weights in any layout, out in another."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clip_train.checkpoints.folder import whole_folder
from clip_train.errors import ConfigError
from clip_train.interop.hugging_face_folder import write_hugging_face_folder
from clip_train.interop.joining import WeightSource
from clip_train.interop.model_card import model_card
from clip_train.interop.model_source import ModelSource, open_model
from clip_train.interop.onnx_towers import write_onnx_folder
from clip_train.interop.open_clip_folder import write_open_clip_folder
from clip_train.interop.openai_file import write_openai_file
from clip_train.interop.single_file import export_single_file

log = logging.getLogger(__name__)

_FOLDERS: dict[str, Callable[[ModelSource, Path], None]] = {
    "huggingface": write_hugging_face_folder,
    "open_clip": write_open_clip_folder,
    "onnx": write_onnx_folder,
}
FORMATS = ("safetensors", *_FOLDERS, "openai")


def export(weights: str | WeightSource, output: Path, format: str, model: Mapping[str, Any] | None = None) -> str:
    """Write a model for other programs, whole or not at all.

    Args:
        weights: where to take them from, or what `read_weights` takes.
        output: a file for `safetensors` and `openai`, else a folder that does not exist yet.
        format: one of `FORMATS`.
        model: the `model` config; None for that of a checkpoint of ours.

    Returns:
        What was written, for the user.

    Raises:
        ConfigError: the weights cannot be read, the format cannot hold them, or the output cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"format={format} is none of {', '.join(FORMATS)}")
    if format == "safetensors":
        return f"{export_single_file(weights, output)} weights to {output}"
    if format in _FOLDERS and output.exists():
        raise ConfigError(f"output={output} is there already; give a folder that is not")
    source = open_model(weights, model)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if format == "openai":
            write_openai_file(source, output)
            return f"OpenAI's state dict to {output}"
        with whole_folder(output) as folder:
            folder.mkdir()
            _FOLDERS[format](source, folder)
            (folder / "README.md").write_text(model_card(source, format))
            names = ", ".join(sorted(path.name for path in folder.iterdir()))
    except OSError as error:
        raise ConfigError(f"output={output}: {error.strerror or error}; give a path that can be written") from error
    return f"{names} to {output}"
