"""What a run begins from: a checkpoint it goes on from, or weights."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import SafetensorError
from torch import nn

from clip_train.checkpoints.choice import changed_settings, check_data, check_model, newest_valid
from clip_train.checkpoints.folder import InvalidCheckpointError, Manifest, read_weights, verify
from clip_train.checkpoints.tensor_files import read_tensors
from clip_train.data.fingerprint import differences
from clip_train.errors import ConfigError
from clip_train.training.run_folder import RunFolder

log = logging.getLogger(__name__)

_MAY_DIFFER = ("data",)
# Where a run lives and what it tells has no say in its outcome.
_SILENT = ("run_name", "output_dir", "resume", "init_from", "logger", "checkpoint", "eval", "model_name")


@dataclass(frozen=True)
class Resume:
    """The `resume` setting.

    Attributes:
        source: `never`, `auto` or the path of a checkpoint.
        allow: what may differ from the checkpoint's although it decides the outcome.
    """

    source: str
    allow: tuple[str, ...] = ()

    @classmethod
    def of(cls, cfg: DictConfig) -> "Resume":
        """Raises ConfigError for a value of `resume.allow` that is unknown."""
        if not isinstance(cfg.resume, DictConfig):  # resume: auto in a file of the user's
            return cls(str(cfg.resume))
        allow = tuple(cfg.resume.allow or ())
        if unknown := [name for name in allow if name not in _MAY_DIFFER]:
            raise ConfigError(f"resume.allow={unknown[0]} is none of {', '.join(_MAY_DIFFER)}")
        return cls(str(cfg.resume["from"]), allow)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as they were written."""

    path: Path
    manifest: Manifest


def find_checkpoint(folder: RunFolder, resume: Resume) -> Checkpoint | None:
    """The checkpoint to go on from; None for a fresh start.

    Raises:
        ConfigError: the path holds no valid checkpoint, or none of the run's is valid.
    """
    if resume.source == "never":
        return None
    if resume.source == "auto":
        found = newest_valid(folder.checkpoints)
        return Checkpoint(*found) if found else None
    path = Path(resume.source)
    if not path.exists():
        raise ConfigError(f"resume={path}: no such checkpoint; give its folder, auto or never")
    try:
        return Checkpoint(path, verify(path))
    except InvalidCheckpointError as error:
        raise ConfigError(f"resume: {path} is no valid checkpoint of clip-train: {error}") from error


def check_resumable(
    checkpoint: Checkpoint, resume: Resume, *, model: nn.Module, config: Mapping[str, Any], data: dict, world_size: int
) -> None:
    """Refuse another model or other data; say which other settings differ.

    Raises:
        ConfigError: what differs may not.
    """
    about = checkpoint.manifest.about
    check_model(checkpoint.path, {f"model.{name}": tuple(w.shape) for name, w in model.state_dict().items()})
    found = differences(about["data"], data)
    if about["config"]["seed"] != config["seed"]:
        found.append(f"seed {config['seed']}, was {about['config']['seed']}: another order")
    check_data(checkpoint.path, found, allowed="data" in resume.allow)
    before, now = ({key: value for key, value in c.items() if key not in _SILENT} for c in (about["config"], config))
    changed = changed_settings({**before, "world_size": about["world_size"]}, {**now, "world_size": world_size})
    if changed:
        log.warning("going on with other settings than %s had: %s", checkpoint.path.name, ", ".join(changed))


def load_initial_weights(model: nn.Module, path: Path) -> None:
    """Start from the weights of a checkpoint, or of a safetensors file with the model's own names.

    Raises:
        ConfigError: they cannot be read, or are of another model.
    """
    try:
        weights = read_weights(path) if path.is_dir() else read_tensors([path])
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"init_from={path}: cannot be read ({error}); give a checkpoint or .safetensors") from error
    weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    expected = model.state_dict()
    differ = sorted(
        name
        for name in expected.keys() | weights.keys()
        if name not in expected or name not in weights or expected[name].shape != weights[name].shape
    )
    if differ:
        raise ConfigError(
            f"init_from={path}: of another model: {len(differ)} of {len(expected)} weights are missing, unexpected"
            f" or of another shape: {', '.join(differ[:3])}"
        )
    model.load_state_dict(weights)
    log.info("starting from the weights of %s", path)
