"""Which checkpoint a run goes on from, and whether it may."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from clip_train.checkpoints.folder import (
    InvalidCheckpointError,
    Manifest,
    list_checkpoints,
    verify,
    weight_shapes,
)
from clip_train.errors import ConfigError

log = logging.getLogger(__name__)

_NAMED = 3


def newest_valid(folder: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that is as it was written; says which it skips. None if there is none at all.

    Raises:
        ConfigError: there are some, but none is valid.
    """
    skipped = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, verify(path)
        except InvalidCheckpointError as error:
            log.warning("skipping the checkpoint %s: %s", path, error)
            skipped.append(f"{path.name}: {error}")
    if skipped:
        raise ConfigError(
            f"resume=auto: none of the {len(skipped)} checkpoints in {folder} is valid ({skipped[0]});"
            " move them away to start anew"
        )
    return None


def check_model(path: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Make sure that a checkpoint is of this model.

    Args:
        path: the checkpoint.
        expected: shapes of the model's weights, as the checkpoint names them.

    Raises:
        ConfigError: it is of another; names what differs.
    """
    if differences := weight_differences(expected, weight_shapes(path)):
        raise ConfigError(f"resume: {path} is of another model; its weights: {differences}")


def weight_differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """How found weights differ in name and shape from those of the model; empty if they do not."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} is {list(found[name])}, not {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    return "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names)


def check_data(path: Path, differences: Collection[str], allowed: bool) -> None:
    """Refuse other data than the checkpoint's, or say what differs.

    Raises:
        ConfigError: it differs, and that was not allowed.
    """
    if not differences:
        return
    text = "; ".join(differences)
    if not allowed:
        raise ConfigError(
            f"resume: {path} was trained on other data: {text}; to go on all the same add resume.allow=[data]"
        )
    log.warning("going on with other data than %s had: %s", path.name, text)


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key=new (was old)` for each setting that two configs do not share."""
    changed = []
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            changed += changed_settings(before, now, f"{prefix}{key}.")
        elif before != now:
            changed.append(f"{prefix}{key}={now} (was {before})")
    return changed


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")
