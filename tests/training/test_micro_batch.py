import math
from types import SimpleNamespace

import pytest
import torch

from clip_train.errors import OutOfMemoryError
from clip_train.models import create_dual_encoder
from clip_train.training.callbacks.micro_batch import _as_large_as_the_state, find_micro_batch_size
from clip_train.training.memory import _free_in_group, explained_out_of_memory, host_memory_limit
from clip_train.training.optim.optimizer import build_optimizer
from tests.models.test_dual_encoder import TINY


@pytest.mark.parametrize(
    ("local_batch", "fits", "expected"),
    [(64, 64, 64), (64, 63, 32), (64, 30, 22), (64, 1, 1), (100, 40, 34), (1, 1, 1)],
)
def test_fewest_equal_micro_batches_that_fit(local_batch, fits, expected):
    tried = []

    def try_step(pairs: int) -> None:
        tried.append(pairs)
        if pairs > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert find_micro_batch_size(try_step, local_batch, lambda failed: failed) == expected
    assert len(tried) < 14


def test_what_fails_on_another_rank_does_not_fit():
    attempts = iter(range(100))
    assert find_micro_batch_size(lambda pairs: None, 64, lambda failed: 1 if next(attempts) > 3 else failed) == 8


def test_no_pair_fits():
    def try_step(pairs: int) -> None:
        raise MemoryError

    with pytest.raises(OutOfMemoryError, match="a single pair"):
        find_micro_batch_size(try_step, 8, lambda failed: failed)


def test_other_errors_are_not_taken_for_memory():
    def try_step(pairs: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        find_micro_batch_size(try_step, 8, lambda failed: failed)
    with pytest.raises(RuntimeError, match="shapes"), explained_out_of_memory(None, 8):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    ("setting", "local_batch", "message"),
    [
        (None, 256, r"micro_batch_size=null \(256 pairs.*try micro_batch_size=128, or auto"),
        (64, 256, r"micro_batch_size=64 \(64 pairs.*try micro_batch_size=32, or auto; model.grad_checkpointing"),
        (512, 256, r"micro_batch_size=512 \(256 pairs.*try micro_batch_size=128"),
        (1, 256, "take a smaller model"),
    ],
)
def test_the_error_names_a_value_to_try(setting, local_batch, message):
    with pytest.raises(OutOfMemoryError, match=message), explained_out_of_memory(setting, local_batch):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_host_runs_out_of_memory_instead_of_being_killed():
    with host_memory_limit(processes=1), pytest.raises(OutOfMemoryError), explained_out_of_memory(None, 2):
        torch.ones(1 << 44)
    assert torch.ones(1 << 20).sum() == 1 << 20


def test_what_files_left_in_a_containers_memory_makes_room(tmp_path, monkeypatch):
    for name, content in {
        "memory.max": "4194304",
        "memory.current": "4194304",
        "memory.stat": "anon 1048576\ninactive_file 2097152\n",
    }.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr("clip_train.training.memory._GROUP", tmp_path)
    assert _free_in_group() == 2048
    (tmp_path / "memory.max").write_text("max")
    assert _free_in_group() == math.inf


@pytest.mark.parametrize("optim", [{}, {"state": "bf16"}, {"name": "lion"}, {"name": "sgd"}], ids=str)
def test_as_much_is_set_aside_as_the_optimizer_will_keep(optim):
    optim = {"lr": 1e-3, "weight_decay": 0.1, **optim}
    model = create_dual_encoder(**TINY)
    parameters = list(model.parameters())
    module = SimpleNamespace(model=model, optim=optim)
    found = sum(held.nbytes for held in _as_large_as_the_state(module, parameters))  # pyright: ignore[reportArgumentType]
    optimizer = build_optimizer(model, optim, fused=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    assert found == pytest.approx(sum(x.nbytes for x in state), rel=0.01)
