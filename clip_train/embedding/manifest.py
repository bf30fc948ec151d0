"""manifest.json: of which weights, which data and with which settings the embeddings in a folder are."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clip_train.data.files import write_atomic
from clip_train.errors import ConfigError, DataError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What all parts of a folder have in common.

    Attributes:
        weights: their checksum and the `model` config, and where they were read from, to find them again.
        settings: what else decides the embeddings.
        parts: what each is made of, in their order.
    """

    weights: Mapping[str, Any]
    settings: Mapping[str, Any]
    parts: Sequence[str]

    def digest(self) -> str:
        """Differs where anything but the place of the weights does."""
        return _digest([self.made_by(), list(self.parts)])

    def made_by(self) -> str:
        """Differs where other weights or settings make other embeddings of the same data."""
        return _digest([self.weights["sha256"], self.weights["model"], dict(self.settings)])

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The folder's; None if it has none. Raises DataError if it cannot be read."""
        path = folder / MANIFEST
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}): remove {folder}") from error

    def check_goes_on(self, old: "Manifest", folder: Path) -> None:
        """Raises ConfigError if the folder has embeddings that others would be mixed with."""
        remedy = "give another output="
        if any(old.weights[key] != self.weights[key] for key in ("sha256", "model")):
            raise ConfigError(f"output={folder} holds embeddings of another model, {old.weights['weights']}: {remedy}")
        for key, value in self.settings.items():
            if old.settings.get(key) != value:
                raise ConfigError(f"output={folder} was made with {key}={old.settings.get(key)}, not {value}: {remedy}")
        if list(self.parts[: len(old.parts)]) != list(old.parts):
            other = f"{len(old.parts)} parts from {old.parts[0]} on"
            raise ConfigError(f"output={folder} holds embeddings of other data, {other}: {remedy}")

    def write(self, folder: Path) -> None:
        """Raises DataError if it cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / MANIFEST, json.dumps(asdict(self), indent=1).encode())
        except OSError as error:
            raise DataError(f"output={folder} cannot be written: {error.strerror or error}") from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
