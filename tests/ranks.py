"""Runs a function on several real processes joined by gloo."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(*args)` on each rank; the results in rank order. The function must be importable by name."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (function, world_size, folder, args), nprocs=world_size)  # pyright: ignore[reportPrivateImportUsage]
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(function(*args), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
