"""Tensors of a TorchScript archive, read without running any of the code in it.

OpenAI publishes its weights so. The archive is a zip file of bare tensors, of source code, which is never looked at,
and of a pickle that says which attribute of which module is which tensor. The pickle is read by an unpickler that knows
tensors and containers; every class of the archive becomes one that only keeps its attributes, all else is refused.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive; one of `torch.save` is a zip file too, but holds no constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters, buffers and other tensors of the module, by the names that a state dict has.

    Raises:
        pickle.UnpicklingError: it holds something else than tensors, plain values and modules.
        OSError, zipfile.BadZipFile, KeyError: it cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        with archive.open(root) as file:
            module = _TensorUnpickler(file, archive, root.removesuffix("data.pkl")).load()
    tensors: dict[str, Tensor] = {}
    _collect(module, "", tensors)
    return tensors


class _Module:
    """A module of the archive: its attributes."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__."):
            return _Module
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("collections", "OrderedDict"): OrderedDict,
            **{("torch", storage): dtype for storage, dtype in _DTYPES.items()},
        }
        if module == "torch.jit._pickle":  # lists that know the type of their entries
            return _first_argument
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither a tensor nor a plain value")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """The numbers of a tensor, flat."""
        _, dtype, key, _, _ = pid
        if key not in self._storages:
            content = self._archive.read(f"{self._folder}data/{key}")
            self._storages[key] = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0)
        return self._storages[key]


def _rebuild_tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _first_argument(value: Any, *_: Any) -> Any:
    return value


def _collect(value: Any, name: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors[name] = value
    elif isinstance(value, _Module):
        for key, entry in getattr(value, "attributes", {}).items():
            _collect(entry, f"{name}.{key}" if name else key, tensors)
