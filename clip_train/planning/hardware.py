"""What a device can do: rates, memory and bandwidths, from a table or measured here."""

import difflib
import json
import os
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clip_train.data.files import write_atomic
from clip_train.errors import ConfigError

_GIB, _TERA, _GIGA = 2**30, 1e12, 1e9
CPU, CUDA = "cpu", "cuda"
_THIS_PROCESSOR = "this processor"


@dataclass(frozen=True)
class Hardware:
    """A kind of device.

    Attributes:
        memory: bytes that a program sees.
        bf16, fp32: operations per second of dense products. PyTorch rounds no fp32 product to TF32 unless told to.
        link, network: bytes per second that a device sends to others in its node, and to those of other nodes.
        device: `cpu` or `cuda`.
        host: bytes per second between host memory and the device, each way.
        float8: operations per second of dense products in float8, summed in fp32; None where there are none.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    link: float
    network: float
    device: str = CUDA
    host: float = 32e9
    float8: float | None = None

    def rate(self, precision: str) -> float:
        """Operations per second under a `trainer.precision`."""
        return self.fp32 if precision in ("32", "32-true") else self.bf16


def _gpu(
    name: str, memory: float, rates: tuple[float, float, float | None], bandwidths: tuple[float, float, float]
) -> Hardware:
    """In GiB, in TFLOP/s of bf16, fp32 and float8, and in GB/s of link, network and host."""
    bf16, fp32, float8 = rates
    link, network, host = (bandwidth * _GIGA for bandwidth in bandwidths)
    float8 = None if float8 is None else float8 * _TERA
    return Hardware(name, memory * _GIB, bf16 * _TERA, fp32 * _TERA, link, network, CUDA, host, float8)


# Vendors' data sheets: products without sparsity; those in float8, which an A100 has not, with sums in fp32. Memory is
# what drivers report. Links one way: NVLink, or PCIe 4.0 x16. Networks are what is usual in nodes of eight: an
# InfiniBand adapter of 200 (A100) or 400 Gb/s per GPU; elsewhere 100 and 25 Gb/s of Ethernet per GPU. To the host PCIe
# x16, 5.0 for H100 and H200, else 4.0.
TABLE = {
    "a100": _gpu("A100 SXM 80 GB", 79.2, (312, 19.5, None), (300, 25, 32)),
    "h100": _gpu("H100 SXM 80 GB", 79.2, (989, 67, 1979), (450, 50, 64)),
    "h200": _gpu("H200 SXM 141 GB", 139.8, (989, 67, 1979), (450, 50, 64)),
    "l40s": _gpu("L40S 48 GB", 44.4, (362, 91.6, 733), (32, 12.5, 32)),
    "rtx4090": _gpu("RTX 4090 24 GB", 23.5, (165, 82.6, 330), (32, 3.1, 32)),
}
_UNKNOWN_GPU = _gpu("a GPU", 0, (0, 0, None), (32, 3.1, 32))

# What a driver calls the GPUs of the table. Others of these families, such as the H100 PCIe, have other rates.
_DRIVER_NAMES = {
    "a100": r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe",
    "h100": r"H100 80GB HBM3",
    "h200": r"H200",
    "l40s": r"L40S",
    "rtx4090": r"GeForce RTX 4090",
}


def known_gpu(driver_name: str) -> Hardware | None:
    """The entry of the table for what `torch.cuda.get_device_name` says; None if it has none."""
    bare = driver_name.removeprefix("NVIDIA ")
    return next((TABLE[key] for key, name in _DRIVER_NAMES.items() if re.fullmatch(name, bare)), None)


def find_hardware(name: str, setting: str = "plan.hardware") -> Hardware:
    """One of the table, this processor measured now (`cpu`), or what `clip-plan calibrate` wrote (`NAME.json`).

    Args:
        setting: the key that names it.

    Raises:
        ConfigError: there is no such hardware, or the file is none of ours.
    """
    if name in TABLE:
        return TABLE[name]
    if name == CPU:
        return measure_hardware(torch.device("cpu"))
    if name.endswith(".json"):
        return read_hardware(Path(name), setting)
    close = difflib.get_close_matches(name, [*TABLE, CPU], n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join([*TABLE, CPU])}"
    raise ConfigError(f"{setting}={name} is unknown; {hint} Or give a file that `clip-plan calibrate` wrote")


def read_hardware(path: Path, setting: str) -> Hardware:
    """Raises ConfigError if the file is not there, or none of ours."""
    try:
        return _of_json(json.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"{setting}={path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{setting}={path} is no file of `clip-plan calibrate`: write it again") from error


def _of_json(found: Any) -> Hardware:
    """Raises ValueError, KeyError or TypeError if it is no hardware. Older files lack what has a default."""
    name = str(found["name"])
    numbers = {key: float(found[key]) for key in ("memory", "bf16", "fp32", "link", "network")}
    numbers["host"] = float(found.get("host", Hardware.host))
    device = str(found.get("device", CPU if name.startswith(_THIS_PROCESSOR) else CUDA))
    if device not in (CPU, CUDA):
        raise ValueError(device)
    float8 = found.get("float8")
    return Hardware(name, **numbers, device=device, float8=None if float8 is None else float(float8))


def write_hardware(hardware: Hardware, path: Path) -> None:
    """Raises ConfigError if the file cannot be written."""
    write_json(asdict(hardware), path, "output")


def write_json(content: Any, path: Path, setting: str) -> None:
    """Raises ConfigError, naming the setting, if the file cannot be written."""
    try:
        write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"{setting}={path} cannot be written: {error.strerror or error}") from error


def measure_hardware(device: torch.device, seconds: float = 0.5) -> Hardware:
    """Rates of square products and size of memory.

    Bandwidths are not measured: they are those of the table, where that has the GPU. Nor is the rate in float8: None.

    Args:
        seconds: of products, for each of the two rates.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    fp32 = _product_rate(device, torch.float32, size, seconds)
    bf16 = fp32
    if on_gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        bf16 = _product_rate(device, torch.bfloat16, size, seconds)
    if on_gpu:
        known = torch.cuda.get_device_properties(device)
        like = next((TABLE[key] for key in TABLE if key in known.name.lower().replace(" ", "")), _UNKNOWN_GPU)
        return replace(like, name=known.name, memory=float(known.total_memory), bf16=bf16, fp32=fp32, float8=None)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = f"{_THIS_PROCESSOR}, {torch.get_num_threads()} thread(s)"
    return Hardware(name, float(memory), bf16, fp32, link=5e9, network=1.2e9, device=CPU)


def _product_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """Operations per second; the fastest of several products, as others may want the device."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    fastest, end = float("inf"), time.perf_counter() + seconds
    for number in range(1000):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if number:  # the first one finds kernels and memory
            fastest = min(fastest, now - start)
        if number and now > end:
            break
    return 2 * size**3 / fastest
