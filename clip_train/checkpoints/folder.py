"""A checkpoint on disk: a folder of tensors and plain values with a manifest of sizes and checksums.

    samples_00000000012800.ckpt/
        manifest.json           samples seen, sizes and checksums of the files below, and about the run
        model.safetensors       weights; of a sharded model, model.00000.safetensors and so on, one file per rank
        optimizer.safetensors   the optimizer's tensors, likewise
        ema.safetensors         averages of the weights, likewise, where they are kept
        state.pt                all else: schedule, scaler, counters of callbacks

It is written under another name and renamed when everything is on the disk, so that it is whole or absent.
"""

import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from clip_train.checkpoints.snapshot import Snapshot, join_optimizers
from clip_train.checkpoints.tensor_files import (
    FileRecord,
    file_record,
    read_shapes,
    read_tensors,
    write_file,
    write_tensors,
)
from clip_train.data.files import write_atomic

FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = ".tmp"
STATE = "state.pt"
_NAME = re.compile(r"samples_(\d{14})\.ckpt")


class InvalidCheckpointError(Exception):
    """A checkpoint that is not as it was written; the message says what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        samples_seen: where the run stood.
        files: size and checksum of every file.
        about: of the run: config, data, environment, metrics.
    """

    samples_seen: int
    files: Mapping[str, FileRecord]
    about: Mapping[str, Any] = field(default_factory=dict)


def checkpoint_name(samples_seen: int) -> str:
    """The folder's name; names sort by samples seen."""
    return f"samples_{samples_seen:014d}.ckpt"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, valid or not, oldest first."""
    return sorted(path for path in folder.glob("samples_*.ckpt") if _NAME.fullmatch(path.name))


def samples_of(path: Path) -> int:
    """The samples seen that a checkpoint's name says."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def write_pieces(folder: Path, snapshot: Snapshot, rank: int, sharded: bool) -> dict[str, FileRecord]:
    """Write one rank's part into `folder`.

    Raises:
        OSError: no space, no permission.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tag = f".{rank:05d}" if sharded else ""
    files = {}
    for name, pieces in (("model", snapshot.model), ("optimizer", snapshot.optimizer), ("ema", snapshot.ema)):
        if pieces:
            file = f"{name}{tag}.safetensors"
            files[file] = write_tensors(folder / file, pieces)
    if snapshot.rest is not None:
        files[STATE] = write_file(folder / STATE, [snapshot.rest])
    return files


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the last file of a checkpoint, or replace it."""
    content = {
        "format": FORMAT,
        "samples_seen": manifest.samples_seen,
        "files": {name: asdict(record) for name, record in sorted(manifest.files.items())},
        "about": manifest.about,
    }
    write_atomic(folder / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())
    _sync_folder(folder)


@contextmanager
def whole_folder(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """A folder to fill, all ranks the same, that gets its name, replacing what had it, when it is complete.

    Args:
        temporary: its name until then; None for one that follows from `path`.
    """
    temporary = temporary or path.with_name(f"{path.name}{UNFINISHED}")
    try:
        yield temporary
        replaced = path.with_name(f"{path.name}.replaced{UNFINISHED}")
        if path.exists():
            os.replace(path, replaced)
        os.replace(temporary, path)
        _sync_folder(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there in the right size.

    Raises:
        InvalidCheckpointError: it is no checkpoint, or files are missing or have another size.
    """
    try:
        content = json.loads((path / MANIFEST).read_text())
        if content["format"] != FORMAT:
            raise InvalidCheckpointError(f"format {content['format']}, but this version reads {FORMAT}")
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        manifest = Manifest(content["samples_seen"], files, content["about"])
    except FileNotFoundError as error:
        raise InvalidCheckpointError(f"it has no {MANIFEST}") from error
    except NotADirectoryError as error:
        raise InvalidCheckpointError("it is no folder") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidCheckpointError(f"its {MANIFEST} cannot be read ({error})") from error
    for name, record in manifest.files.items():
        size = _size(path / name)
        if size != record.bytes:
            found = "missing" if size is None else f"{size:,} bytes"
            raise InvalidCheckpointError(f"{name} is {found}, should be {record.bytes:,} bytes")
    return manifest


def _size(path: Path) -> int | None:
    """Bytes of a file; None if there is none, or it goes this moment."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def verify(path: Path) -> Manifest:
    """The manifest, after all files were read and are what they were.

    Raises:
        InvalidCheckpointError: the checkpoint is not as it was written.
    """
    manifest = read_manifest(path)
    for name, record in manifest.files.items():
        try:
            found = file_record(path / name)
        except OSError as error:
            raise InvalidCheckpointError(f"{name} cannot be read ({error.strerror})") from error
        if found != record:
            raise InvalidCheckpointError(f"{name} has changed since it was written: its checksum differs")
    return manifest


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The whole state, in host memory, as Lightning has it.

    Raises:
        InvalidCheckpointError: the checkpoint is not complete.
    """
    read_manifest(path)
    rest = torch.load(io.BytesIO((path / STATE).read_bytes()), map_location="cpu", weights_only=True)
    # The optimizer takes the tensors as they are: they must not be a view of the file.
    optimizers = {name: tensor.clone() for name, tensor in read_tensors(_files(path, "optimizer")).items()}
    averages = read_tensors(_files(path, "ema"))
    return {
        **rest,
        **({"ema": averages} if averages else {}),
        "state_dict": read_weights(path),
        "optimizer_states": join_optimizers(optimizers, rest["optimizer_states"]),
    }


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights alone, as the LightningModule names them, in host memory."""
    return read_tensors(_files(path, "model"))


def read_ema_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights, as `read_weights` has them, with their averages (`ema.decay`) in place of those that were trained.

    Raises:
        InvalidCheckpointError: the run kept no averages.
    """
    averages = read_tensors(_files(path, "ema"))
    if not averages:
        raise InvalidCheckpointError("it has no averaged weights: the run had no ema.decay")
    weights = read_weights(path)
    return {**weights, **{name: average.to(weights[name].dtype) for name, average in averages.items()}}


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights."""
    return read_shapes(_files(path, "model"))


def _files(path: Path, group: str) -> list[Path]:
    return sorted(path.glob(f"{group}*.safetensors"))
