"""Real processes joined by gloo, for what must hold on several ranks."""

import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing  # tensors travel through its pipes

from tests.cli.warm_start import context


class RankPool:
    """Processes that stay, so that many small cases need not wait for imports."""

    def __init__(self, world_size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            arguments = (rank, world_size, self._folder.name, there)
            self._processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self._processes[-1].start()
            self._pipes.append(here)

    def run(self, function: Callable[..., Any], *args: Any, ranks: int | None = None) -> list[Any]:
        """`function(*args)` on each of the last ranks (all by default); the results in rank order.

        The function must be importable by name. It finds the group of those ranks in `pool_group(ranks)`.

        Raises:
            RuntimeError: it failed on a rank; the text holds that rank's traceback.
        """
        pipes = self._pipes[-(ranks or len(self._pipes)) :]
        for pipe in pipes:
            pipe.send((function, args))
        answers: dict[Connection, Any] = {}
        while len(answers) < len(pipes):
            for pipe in connection.wait([pipe for pipe in pipes if pipe not in answers]):
                assert isinstance(pipe, Connection)
                failed, answers[pipe] = pipe.recv()
                if failed:  # the others may wait for it
                    for process in self._processes:
                        process.kill()
                    raise RuntimeError(answers[pipe])
        return [answers[pipe] for pipe in pipes]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(30)
        self._folder.cleanup()


_groups: dict[int, dist.ProcessGroup] = {}


def pool_group(ranks: int) -> dist.ProcessGroup | None:
    """In a process of a RankPool: the group of the last ranks. Elsewhere None."""
    return _groups.get(ranks)


def _serve(rank: int, world_size: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    for size in range(1, world_size + 1):
        _groups[size] = dist.new_group(list(range(world_size))[-size:])  # pyright: ignore[reportArgumentType]
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send((False, function(*args)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
    dist.destroy_process_group()


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(*args)` on each of some fresh ranks, which are all the world there is; results in rank order."""
    pool = RankPool(world_size)
    try:
        return pool.run(function, *args)
    finally:
        pool.close()
