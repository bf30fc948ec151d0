"""What the benchmarks share: fresh processes, their peak memory, what they send, and the machine they ran on."""

import ctypes
import gc
import multiprocessing
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Imported once, by the server that the measured processes are forked from; each would need some ten seconds for it.
_PRELOADED = ["torch.distributed.nn", "clip_train.losses", "open_clip", "matplotlib.figure"]
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(*args)` in as many fresh processes, of one thread each and, if several, joined by gloo.

    The processes are forked from a server that has imported libraries and computed nothing. Returns the results in
    rank order. The function and what it returns must be importable by name, and not from the script itself.
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (function, world_size, folder, args), nprocs=world_size, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(function(*args), f"{folder}/{rank}.pt")
    wait_for_all()
    if world_size > 1:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """A barrier, if there are several ranks."""
    if dist.is_initialized():
        dist.barrier()


def largest_over_ranks(value: float) -> float:
    """The same number on every rank."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


class PeakMemory:
    """The most memory resident during a `with` block, above what was resident when it began; or allocated, on a GPU.

    Linux keeps the peak (VmHWM) and forgets it on request. Where that is not permitted the peak is that of the process
    so far, which is right if nothing before the block needed more.

    Attributes:
        bytes: known after the block.
    """

    bytes: int

    def __init__(self, device: str = "cpu") -> None:
        self._on_gpu = device != "cpu"

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else freed memory of a warm-up would be used again, uncounted
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else _resident("VmHWM")
        self.bytes = max(peak - self._before, 0)


def _resident(key: str) -> int:
    """A line of /proc/self/status in bytes; the peak so far where there is none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class WireBytes(TorchDispatchMode):
    """Counts what this rank sends inside a `with` block.

    Every collective, whichever Python function or backward pass starts it, is a call of torch's dispatcher, and is seen
    here with its tensors. What it costs is taken from the ring algorithms, not from gloo's: of W ranks, each sends

    - (W-1)/W of the gathered bytes in an all-gather, and of the scattered ones in a reduce-scatter or all-to-all,
    - 2 (W-1)/W of the bytes of an all-reduce, which is both,
    - a message's bytes in a send, and the W-1 others' parts in a scatter if it is the root.

    Attributes:
        sent: bytes so far.
    """

    sent: float = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.sent += _sent_by(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))


def _sent_by(operation: str, args: Sequence[Any]) -> float:
    others = dist.get_world_size() - 1
    share = others / (others + 1)
    match operation:
        case "allreduce_":
            return 2 * share * tensor_bytes(args[0])
        case "allgather_" | "_allgather_base_":
            return share * tensor_bytes(args[0])
        case "reduce_scatter_" | "_reduce_scatter_base_" | "alltoall_" | "alltoall_base_" | "scatter_":
            return share * tensor_bytes(args[1])  # of a scatter only the root has an input
        case "send":
            return tensor_bytes(args[0])
        case "recv_" | "barrier":
            return 0
    raise NotImplementedError(f"what {operation} sends is not known here")


def tensor_bytes(tensors: Tensor | Iterable) -> int:
    """Bytes of a tensor, or of all in nested lists."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(tensor_bytes, tensors))


def available_bytes() -> int:
    """Memory that processes can get without anything being swapped out."""
    return _kib(Path("/proc/meminfo"), "MemAvailable") * 1024


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for it; without them torch's bf16 products take some 70 times longer."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def describe_machine(packages: Sequence[str] = ("torch", "open-clip-torch")) -> dict[str, str]:
    """What a reader has to know of where figures come from; `gpu` and `commit` only where there are such."""
    cpu = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    cpu = {key.strip(): value.strip() for key, value in cpu.items()}
    flags = cpu.get("flags", "").split()
    memory = _kib(Path("/proc/meminfo"), "MemTotal")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{cpu.get('model name', platform.machine())}, {os.cpu_count()} cores seen by the system",
        "instructions": ", ".join(f"{name} {'yes' if name in flags else 'no'}" for name in _INSTRUCTIONS),
        "memory": f"{memory / 2**20:.1f} GiB, {available_bytes() / 2**30:.1f} GiB available",
        **_gpu(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        **_commit(),
    }


def _gpu() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    name = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB"
    return {"gpu": name, "driver": driver or "unknown", "cuda": str(torch.version.cuda)}


def _commit() -> dict[str, str]:
    """Of the checkout that this file is in."""
    git = ("git", "-C", str(Path(__file__).parents[2]))
    commit = _said(*git, "rev-parse", "--short", "HEAD")
    changed = _said(*git, "status", "--porcelain", "--untracked-files=no", "--", "clip_train", "configs", "scripts")
    return {"commit": commit + (" with changes" if changed else "")} if commit else {}


def _said(*command: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    with suppress(OSError):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return "" if done.returncode else done.stdout.strip()
    return ""


def _kib(path: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(key))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
