"""The loader: which batches, in which processes."""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from clip_train.data.batches import Batch
from clip_train.processes import die_with_parent

_may_end = multiprocessing.Event()


class BatchStarts(Sampler[int]):
    """Where the batches of a run begin, from a position on. Endless, so that the trainer alone decides the end."""

    def __init__(self, position: int, batch_size: int) -> None:
        self.position, self.batch_size = position, batch_size

    def __iter__(self) -> Iterator[int]:
        start = self.position
        while True:
            yield start
            start += self.batch_size


def make_loader(batches: Dataset[Batch], keys: Iterable, num_workers: int, pin_memory: bool = False) -> DataLoader:
    """Load `batches[key]` for each key, in order, whatever the number of workers."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker,
    )


def _as_is(batch: Any) -> Any:
    return batch


def let_workers_end() -> None:
    """From now on workers end when they are told to, even in the middle of a download."""
    _may_end.set()


def keep_workers() -> None:
    """Workers heed only the trainer again, for another part of the run."""
    _may_end.clear()


def _init_worker(_: int) -> None:
    die_with_parent()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # schedulers signal every process; the trainer decides
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if _may_end.is_set() else None)
