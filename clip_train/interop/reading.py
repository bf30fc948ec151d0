"""Weights from a file, a folder or the Hugging Face Hub, whatever their layout; nothing in them is run as code."""

import json
import logging
import pickle
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from clip_train.checkpoints.base import weights_checksum
from clip_train.checkpoints.folder import MANIFEST, InvalidCheckpointError, Manifest, read_ema_weights, verify
from clip_train.checkpoints.folder import read_weights as read_checkpoint_weights
from clip_train.checkpoints.tensor_files import read_tensors
from clip_train.errors import ConfigError, first_line
from clip_train.interop import hugging_face, open_clip
from clip_train.interop.torchscript import is_torchscript, read_torchscript

HUB = "hf-hub:"
# What a folder of open_clip, of transformers or of timm may hold, the best first.
_FOLDER_FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_WRAPPERS = ("state_dict", "model")  # under which a training checkpoint has its weights
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, a LightningModule
# A name that only this layout has, what it is called, and the way to our names.
_LAYOUTS: tuple[tuple[str, str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]], ...] = (
    ("vision.trunk.", "clip-train's", dict),
    ("visual.", "open_clip's", open_clip.to_ours),
    ("vision_model.", "Hugging Face's", hugging_face.to_ours),
)
_ASKS_FOR = re.compile(r"Unsupported (?:global|class): (?:GLOBAL )?(\S+)")  # in torch's message of many lines
_CLASSIFIERS = ("head.", "fc.", "classifier.", "mask_token")  # of an image tower that was trained alone


@dataclass(frozen=True)
class Weights:
    """Weights under our names, in the precision they were stored in.

    Attributes:
        tensors: by name; a name that has no place in our models is as it was found.
        layout: where the names came from, in words.
        complete: False for an image tower alone.
        manifest: of a checkpoint of ours, else None.
        quick_gelu: whether they were trained with QuickGELU, which no name or shape tells; None where nothing does.
        read_checksum: of the tensors as they were read, where those here were computed from them.
    """

    tensors: dict[str, Tensor]
    layout: str
    complete: bool = True
    manifest: Manifest | None = None
    quick_gelu: bool | None = None
    read_checksum: str | None = None

    def checksum(self) -> str:
        """Of the tensors as they were read, for merging rounds otherwise on another machine."""
        return self.read_checksum or weights_checksum(self.tensors)


@dataclass(frozen=True)
class _Found:
    """Tensors by name, what held them, and `quick_gelu` as above."""

    tensors: dict[str, Tensor]
    container: str
    quick_gelu: bool | None = None


def lasting(source: str) -> str:
    """The same weights' name from wherever they are read again: a path from the root, or a name on the Hub."""
    return source if source.startswith(HUB) else str(Path(source).resolve())


def read_weights(source: str, key: str, trunk: Collection[str] = (), ema: bool = False) -> Weights:
    """Read weights and bring them under our names.

    Args:
        source: a checkpoint of ours; a file of safetensors, of `torch.save` or of TorchScript; a folder of open_clip,
            transformers or timm; or `hf-hub:organisation/name` of such a folder.
        key: the setting it came from, for messages.
        trunk: names of the weights of the model's timm trunk; a file that has most of them is an image tower.
        ema: take the averages of a checkpoint of ours (`ema.decay`) in place of the weights that were trained.

    Raises:
        ConfigError: it is not there, has no averages, cannot be read without running code, or is in no known layout.
    """
    if ema and not (Path(source) / MANIFEST).exists():
        raise ConfigError(f"{key}={source} is no checkpoint of ours, which might have averaged weights")
    try:
        if source.startswith(HUB):
            return _recognised(_read_folder(_hub_files(source, key)), trunk)
        path = Path(source)
        if (path / MANIFEST).exists():
            manifest = verify(path)
            tensors = _without_prefixes((read_ema_weights if ema else read_checkpoint_weights)(path))
            return Weights(tensors, "a checkpoint of clip-train", manifest=manifest)
        if path.is_dir():
            return _recognised(_read_folder(lambda name: path / name if (path / name).exists() else None), trunk)
        return _recognised(_read_file(path), trunk)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{key}={source}: {error}" if error.errno is None else f"{key}={source}: not there"
        ) from error
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{key}={source}: refused, as reading it could run code ({first_line(error)});"
            " save its state dict alone, or as safetensors"
        ) from error
    except (InvalidCheckpointError, SafetensorError, OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{key}={source}: cannot be read as weights ({first_line(error)})") from error


def _read_folder(file_of: Callable[[str], Path | None]) -> _Found:
    """The weights of a folder whose files `file_of` gives by name, None for one that there is not.

    Raises:
        FileNotFoundError: it holds no weights, or not all parts of them.
    """
    for name in _FOLDER_FILES:
        path = file_of(name)
        if path is None:
            continue
        parts = [name]
        if name.endswith(".index.json"):
            parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        tensors: dict[str, Tensor] = {}
        for part in parts:
            if (part_path := file_of(part)) is None:
                raise FileNotFoundError(f"{part}, which {name} names, is not there")
            tensors |= _read_file(part_path).tensors
        return _Found(tensors, f"in {name}", _quick_gelu_of_folder(file_of, name.startswith("open_clip")))
    raise FileNotFoundError(
        f"the folder has neither {MANIFEST} (a checkpoint of ours) nor any of {', '.join(_FOLDER_FILES)}"
    )


def _quick_gelu_of_folder(file_of: Callable[[str], Path | None], open_clips: bool) -> bool | None:
    """What the config beside the weights says, or leaves at its library's default."""
    path = file_of("open_clip_config.json" if open_clips else "config.json")
    config = json.loads(path.read_text()) if path else {}
    if open_clips:
        return bool(config["model_cfg"].get("quick_gelu", False)) if "model_cfg" in config else None
    if config.get("model_type") != "clip":
        return None
    return (config.get("text_config") or {}).get("hidden_act", "quick_gelu") == "quick_gelu"


def _read_file(path: Path) -> _Found:
    """The weights of one file.

    Raises:
        pickle.UnpicklingError: reading it could run code.
        Others: it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # after the eight bytes of the header's length
        return _Found(read_tensors([path]), "safetensors")
    if is_torchscript(path):
        return _Found(read_torchscript(path), "a TorchScript archive", quick_gelu=True)  # only OpenAI publishes them
    content = _load_without_code(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not all(isinstance(weight, Tensor) for weight in content.values()):
        raise ValueError("it holds no state dict")
    return _Found(dict(content), "a state dict of torch")


def _load_without_code(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if asks_for := _ASKS_FOR.search(str(error)):
            raise pickle.UnpicklingError(f"it asks for {asks_for[1]}, which is no tensor") from error
        raise ValueError("it is neither safetensors nor a state dict of torch") from error


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _recognised(found: _Found, trunk: Collection[str]) -> Weights:
    """The tensors under our names.

    Raises:
        ValueError: their names are of no known layout.
    """
    tensors, container = _without_prefixes(found.tensors), found.container
    for prefix, layout, to_ours in _LAYOUTS:
        if any(name.startswith(prefix) for name in tensors):
            return Weights(to_ours(tensors), f"{layout} names, {container}", quick_gelu=found.quick_gelu)
    if 2 * len(tensors.keys() & set(trunk)) > len(trunk) > 0:
        kept = {n: w for n, w in tensors.items() if n in trunk or not n.startswith(_CLASSIFIERS)}
        ours = {f"vision.trunk.{name}": weight for name, weight in kept.items()}
        return Weights(ours, f"an image tower with timm's names, {container}", complete=False)
    raise ValueError(f"names such as {', '.join(sorted(tensors)[:3])} are of no layout that is known here")


def _hub_files(source: str, key: str) -> Callable[[str], Path | None]:
    """Files of a repository on the Hub, from the cache or the network.

    Raises (when called):
        ConfigError: there is no such repository, or neither a network nor a copy.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name, absent, offline = source.removeprefix(HUB), 0, False
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each time it tries again

    def file_of(file: str) -> Path | None:
        nonlocal absent, offline
        try:
            return Path(hf_hub_download(name, file, local_files_only=offline))
        except LocalEntryNotFoundError:  # no network; another file may be in the cache
            offline = True
        except EntryNotFoundError:
            pass
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise ConfigError(
                f"{key}={source}: the Hub shows you no such repository; check the name, or run `hf auth login`"
            ) from error
        except HfHubHTTPError as error:
            raise ConfigError(f"{key}={source}: the Hub answers {first_line(error)}") from error
        absent += 1
        if offline and absent == len(_FOLDER_FILES):
            raise ConfigError(
                f"{key}={source}: the Hub cannot be reached and the cache has no copy;"
                " give the path of one, or run this once where there is a network"
            )
        return None

    return file_of
