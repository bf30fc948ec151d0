"""Both towers as ONNX graphs: normalised pixels, or token ids, to unit vectors, any number at once."""

import io
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_train.errors import ConfigError, first_line
from clip_train.interop.hugging_face_folder import write_processor
from clip_train.interop.model_source import ModelSource

_LARGEST_FILE = 1 << 30  # protobuf ends at 2 GiB; larger weights lie beside the graph


class _Encode(nn.Module):
    def __init__(self, model: nn.Module, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encode(inputs)


def write_onnx_folder(source: ModelSource, folder: Path) -> None:
    """Write `image.onnx` (`pixel_values` to `image_embeds`) and `text.onnx` (`input_ids` to `text_embeds`).

    Raises:
        ConfigError: onnx or onnxscript is not installed, or a tower cannot be exported.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError("format=onnx needs onnxscript: pip install '.[onnx]' in the checkout") from error
    model, size = source.model, source.image_size
    vocab_size: int = model.text.trunk.config.vocab_size
    pixels = torch.zeros(2, 3, size, size)
    ids = torch.randint(1, vocab_size, (2, source.config["text"]["context_length"]))
    ids[:, -1] = vocab_size - 1
    image, text = _Encode(model, model.encode_image), _Encode(model, model.encode_text)
    _export(image, pixels, ("pixel_values", "image_embeds"), folder / "image.onnx", _size(model.vision))
    _export(text, ids, ("input_ids", "text_embeds"), folder / "text.onnx", _size(model.text))
    write_processor(source, folder)


def _size(tower: nn.Module) -> int:
    """Bytes of its weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in tower.parameters())


def _export(tower: nn.Module, example: Tensor, names: tuple[str, str], path: Path, size: int) -> None:
    try:
        with _quiet():
            torch.onnx.export(
                tower.eval(),
                (example,),
                str(path),
                input_names=[names[0]],
                output_names=[names[1]],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=size > _LARGEST_FILE,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter's own, and whatever a layer raises while it is traced
        raise ConfigError(f"format=onnx: torch cannot export {path.stem}.onnx ({first_line(error)})") from error


@contextmanager
def _quiet():
    """The exporter warns of what it does not need and prints its progress."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
