"""Errors of one rank, which all ranks must learn of."""

import pytest
import torch
from omegaconf import DictConfig

from clip_train.commands.program import run_program
from clip_train.distributed import agreed, gather_parts, group_rank, of_first_rank, own_part
from clip_train.errors import ClipTrainError, ConfigError, DataError, FaultError, OutOfMemoryError
from tests.cli.embeddings import call
from tests.ranks import RankPool

ERRORS = {
    "typed": ConfigError("task.k=0 is no number"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "worker": RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    "fault in a worker": RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ..."),
    "fault": KeyError("lost"),
}


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(2)
    yield pool
    pool.close()


def fails_on(rank: int, kind: str) -> tuple[str, str]:
    """What this rank raises when that one fails."""
    try:
        with agreed(at_once=8):
            if group_rank() == rank:
                raise ERRORS[kind]
    except ClipTrainError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("typed", "task.k=0 is no number"),
        ("memory", "out of memory, with 8 at once: lower batch_size (of clip-train: eval.batch_size) (CUDA out of"),
        ("worker", "a loader process has died, as a rule for want of memory: lower data.num_workers (DataLoader"),
        ("fault in a worker", "rank 1: RuntimeError: Caught RuntimeError in DataLoader worker process 0"),
        ("fault", "rank 1: KeyError: 'lost'"),
    ],
)
def test_an_error_of_one_rank_ends_all_with_its_line(pool, kind, message):
    here, there = pool.run(fails_on, 1, kind)
    assert here == there and here[1].startswith(message)
    assert (here[0] == "FaultError") == kind.startswith("fault")
    assert pool.run(fails_on, 2, kind) == [("", "")] * 2  # nobody fails; the ranks are still in step


def test_alone_an_error_keeps_its_type():
    for kind, expected in (("typed", ConfigError), ("memory", OutOfMemoryError), ("worker", DataError)):
        with pytest.raises(expected), agreed(at_once=8):
            raise ERRORS[kind]
    for kind, expected in (("fault", KeyError), ("fault in a worker", RuntimeError)):
        with pytest.raises(expected), agreed():
            raise ERRORS[kind]


def test_a_fault_of_another_rank_is_no_error_of_the_user():
    def task(cfg: DictConfig) -> int:
        raise FaultError("rank 1: KeyError: 'lost'")

    code, _, error = call(lambda: run_program("clip-eval", "eval", task))
    assert (code, error) == (1, "clip-eval: error: rank 1: KeyError: 'lost'\n")


@pytest.mark.parametrize("error", [MemoryError(), ERRORS["memory"], RuntimeError("DefaultCPUAllocator: can't")])
def test_out_of_memory_anywhere_is_one_line(error):
    def task(cfg: DictConfig) -> int:
        raise error

    code, _, said = call(lambda: run_program("clip-eval", "eval", task))
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("clip-eval: error: out of memory: take a smaller batch_size or model, or ")


def parts(count: int) -> tuple[list[int], list[int], str]:
    own = own_part(count)
    rows = torch.tensor([[number, -number] for number in own], dtype=torch.int64).view(-1, 2)
    return list(own), gather_parts(rows, count)[:, 0].tolist(), of_first_rank(f"rank {group_rank()}")


@pytest.mark.parametrize("count", [0, 1, 5])
def test_parts_of_ranks_are_contiguous_and_come_together_again(pool, count):
    (first, whole, said), (second, same, also_said) = pool.run(parts, count)
    assert first + second == whole == same == list(range(count))
    assert said == also_said == "rank 0"
