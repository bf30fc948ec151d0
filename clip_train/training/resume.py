"""What a run begins from: a checkpoint it goes on from, or weights."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from clip_train.checkpoints.choice import changed_settings, check_data, check_model, newest_valid
from clip_train.checkpoints.folder import InvalidCheckpointError, Manifest, verify
from clip_train.data.fingerprint import differences
from clip_train.errors import ConfigError
from clip_train.training.module import ClipModule
from clip_train.training.run_folder import RunFolder

log = logging.getLogger(__name__)

_MAY_DIFFER = ("data",)
# Where a run lives and what it tells has no say in its outcome.
_SILENT = (
    "run_name",
    "output_dir",
    "resume",
    "init_from",
    "init_from_ema",
    "logger",
    "checkpoint",
    "eval",
    "model_name",
)


def restarted() -> bool:
    """Whether a scheduler or torchrun has started this run again, with the arguments that it had the first time."""
    return _restarted_by_scheduler() or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _restarted_by_scheduler() -> bool:
    return os.environ.get("CLIP_TRAIN_RESTARTED", "0") != "0"


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
            return cls(_source(cfg.resume))
        allow = tuple(cfg.resume.allow or ())
        if unknown := [name for name in allow if name not in _MAY_DIFFER]:
            raise ConfigError(f"resume.allow={unknown[0]} is none of {', '.join(_MAY_DIFFER)}")
        return cls(_source(cfg.resume["from"]), allow)


def _source(value: object) -> str:
    # A scheduler starts no run again that was refused the first time, so what is in the folder is the run's own.
    # torchrun does.
    return "auto" if value == "never" and _restarted_by_scheduler() else str(value)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as they were written."""

    path: Path
    manifest: Manifest


def find_checkpoint(folder: RunFolder, resume: Resume) -> Checkpoint | None:
    """The checkpoint to go on from; None for a fresh start.

    A run that began at a path and was restarted goes on from where it had come to.

    Raises:
        ConfigError: the path holds no valid checkpoint, or none of the run's is valid.
    """
    if resume.source == "never":
        return None
    if resume.source == "auto":
        found = newest_valid(folder.checkpoints)
        return Checkpoint(*found) if found else None
    if restarted() and (own := _newest_since(folder, resume.source)):
        log.info("restarted: going on from %s instead of %s", own.path, resume.source)
        return own
    path = Path(resume.source)
    if not path.exists():
        raise ConfigError(f"resume={path}: no such checkpoint; give its folder, auto or never")
    try:
        return Checkpoint(path, verify(path))
    except InvalidCheckpointError as error:
        raise ConfigError(f"resume: {path} is no valid checkpoint of clip-train: {error}") from error


def _newest_since(folder: RunFolder, source: str) -> Checkpoint | None:
    """The newest valid checkpoint of the folder, if the run that wrote it was told to go on from `source`."""
    found = newest_valid(folder.checkpoints)
    setting = found[1].about.get("config", {}).get("resume") if found else None
    began_at = setting["from"] if isinstance(setting, Mapping) else setting
    return Checkpoint(*found) if found and began_at == source else None


def check_resumable(
    checkpoint: Checkpoint,
    resume: Resume,
    *,
    module: ClipModule,
    config: Mapping[str, Any],
    data: dict,
    world_size: int,
) -> None:
    """Refuse another model or other data; say which other settings differ.

    Raises:
        ConfigError: what differs may not.
    """
    about = checkpoint.manifest.about
    _check_optimizer(checkpoint.path, about["config"], config)
    check_model(checkpoint.path, {name: tuple(w.shape) for name, w in module.saved_weights().items()})
    found = differences(about["data"], data)
    if about["config"]["seed"] != config["seed"]:
        found.append(f"seed {config['seed']}, was {about['config']['seed']}: another order")
    check_data(checkpoint.path, found, allowed="data" in resume.allow)
    before, now = ({key: value for key, value in c.items() if key not in _SILENT} for c in (about["config"], config))
    changed = changed_settings({**before, "world_size": about["world_size"]}, {**now, "world_size": world_size})
    if changed:
        log.warning("going on with other settings than %s had: %s", checkpoint.path.name, ", ".join(changed))


def _check_optimizer(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    was, wanted = (_state_kind(config.get("optim", {})) for config in (before, now))
    if was != wanted:
        raise ConfigError(
            f"resume: {path} has the optimizer state of {was}, of no use to {wanted}: keep that, or start"
            f" a new run from the weights with init_from={path}"
        )


def _state_kind(optim: Mapping[str, Any]) -> str:
    """The optimizer, and how it keeps its state, if another could not read that; bf16 and fp32 read each other's."""
    return f"optim={optim.get('name', 'adamw')}" + (" optim.state=8bit" if optim.get("state") == "8bit" else "")
