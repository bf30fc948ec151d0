"""Tensors in safetensors files, written in one pass with their checksum; a tensor may lie in pieces in several."""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_BLOCK_BYTES = 1 << 24
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Piece:
    """A tensor, or the part of a sharded one that this rank holds.

    Attributes:
        local: the values.
        shape: of the whole tensor.
        offset: where the part begins in the whole, one number per axis.
    """

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> "Piece":
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.ndim)


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and the SHA-256 of its content."""

    bytes: int
    sha256: str


def write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write the blocks to a new file, on the disk when this returns.

    Raises:
        OSError: no space, no permission.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for block in blocks:
            view = memoryview(block)
            while view:
                written = file.write(view)  # may be short when the disk fills up; the next write says why
                digest.update(view[:written])
                size += written
                view = view[written:]
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def file_record(path: Path) -> FileRecord:
    """Size and checksum of a file as it is.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(file.tell(), digest.hexdigest())


def write_tensors(path: Path, pieces: Mapping[str, Piece]) -> FileRecord:
    """Write tensors in host memory as a safetensors file; what is only a part says so in the file's metadata.

    The same tensors give the same bytes, in whatever order they come.

    The format's own library holds Python's lock while it writes, and would stop training for that long.

    Raises:
        OSError: no space, no permission.
    """
    pieces = dict(sorted(pieces.items()))
    header: dict[str, Any] = {}
    parts = {
        name: {"shape": piece.shape, "offset": piece.offset}
        for name, piece in pieces.items()
        if tuple(piece.local.shape) != piece.shape
    }
    if parts:
        header["__metadata__"] = {"parts": json.dumps(parts)}
    end = 0
    for name, piece in pieces.items():
        start, end = end, end + piece.local.numel() * piece.local.element_size()
        header[name] = {
            "dtype": _DTYPES[piece.local.dtype],
            "shape": list(piece.local.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return write_file(path, _blocks(text, pieces))


def _blocks(header: bytes, pieces: Mapping[str, Piece]) -> Iterable[bytes | memoryview]:
    yield struct.pack("<Q", len(header)) + header
    for piece in pieces.values():
        content = piece.local.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), _BLOCK_BYTES):
            yield content[start : start + _BLOCK_BYTES]


def read_tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of the files, in host memory; those that lie in pieces are put together.

    Raises:
        ValueError: pieces of a tensor are missing.
        OSError, SafetensorError: a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            parts = json.loads((file.metadata() or {}).get("parts", "{}"))
            for name in file.keys():  # noqa: SIM118 (no mapping)
                local = file.get_tensor(name)
                if name not in parts:
                    tensors[name] = local
                    continue
                if name not in tensors:
                    tensors[name] = local.new_empty(parts[name]["shape"])
                    missing[name] = tensors[name].numel()
                where = tuple(slice(o, o + n) for o, n in zip(parts[name]["offset"], local.shape, strict=True))
                tensors[name][where] = local
                missing[name] -= local.numel()
    if incomplete := sorted(name for name, count in missing.items() if count):
        raise ValueError(f"pieces of {len(incomplete)} tensors are missing, first {incomplete[0]}")
    return tensors


def read_shapes(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors, without their values."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            parts = json.loads((file.metadata() or {}).get("parts", "{}"))
            for name in file.keys():  # noqa: SIM118
                shapes[name] = tuple(parts[name]["shape"] if name in parts else file.get_slice(name).get_shape())
    return shapes
