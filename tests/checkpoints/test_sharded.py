"""State sharded by FSDP2 over several ranks, read on any number of them."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from clip_train.checkpoints.folder import list_checkpoints, read_checkpoint
from clip_train.checkpoints.restore import cut_like, restore_optimizer
from clip_train.checkpoints.retention import Retention
from clip_train.checkpoints.snapshot import SnapshotTaker
from clip_train.checkpoints.writer import CheckpointWriter
from tests.checkpoints.states import assert_equal, make_model, make_state, state_of, train, train_a_little
from tests.ranks import run_on_ranks


def shard(model: nn.Module, mesh_shape: tuple[int, ...]) -> nn.Module:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def save_sharded(folder: Path, mesh_shape: tuple[int, ...]) -> int:
    model = shard(make_model(), mesh_shape)
    state = state_of(model, train_a_little(model))
    assert all(isinstance(weight, DTensor) for weight in state["state_dict"].values())
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    writer = CheckpointWriter(folder, Retention(1), rank=rank, ranks=ranks)
    writer.write(SnapshotTaker(copy=True).take(state, rank), {})
    writer.wait()
    assert not writer.failure, writer.failure
    return sum(path.stat().st_size for path in folder.glob(f"*/*.{rank:05d}.safetensors"))


@pytest.mark.parametrize("mesh_shape", [(2,), (4,), (2, 2)])
def test_shards_are_written_by_each_rank_and_make_up_the_whole(tmp_path, mesh_shape):
    sizes = run_on_ranks(save_sharded, torch.Size(mesh_shape).numel(), tmp_path, mesh_shape)
    (checkpoint,) = list_checkpoints(tmp_path)
    found, expected = read_checkpoint(checkpoint), make_state()
    for name, weight in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], weight, rtol=1e-5, atol=1e-6)
    for parameter, values in expected["optimizer_states"][0]["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(
                found["optimizer_states"][0]["state"][parameter][key], value, rtol=1e-4, atol=1e-6
            )
    assert_equal(found["callbacks"], expected["callbacks"])
    if mesh_shape == (2,):
        assert min(sizes) > max(sizes) / 3  # both ranks wrote


def restore_and_go_on(folder: Path, mesh_shape: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    """The whole weights two steps after the checkpoint."""
    state = read_checkpoint(list_checkpoints(folder)[0])
    model = make_model(seed=1)
    model.load_state_dict(state["state_dict"])
    if mesh_shape:
        shard(model, mesh_shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    restore_optimizer(optimizer, state["optimizer_states"][0])
    train(model, optimizer)
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in model.state_dict().items()}


@pytest.mark.parametrize("mesh_shape", [None, (2,), (3,)])
def test_saved_on_four_ranks_and_gone_on_with_on_others(tmp_path, mesh_shape):
    run_on_ranks(save_sharded, 4, tmp_path, (4,))
    ranks = torch.Size(mesh_shape or (1,)).numel()
    found = run_on_ranks(restore_and_go_on, ranks, tmp_path, mesh_shape)
    expected = make_model()
    train(expected, train_a_little(expected))
    for weights in found:
        for name, weight in expected.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_offloaded_state_is_cut_in_host_memory(one_rank, monkeypatch):
    mesh = init_device_mesh("cpu", (1,))
    parameter = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Shard(0)]))
    monkeypatch.setattr(mesh, "_device_type", "meta")  # a mesh of some accelerator
    saved = torch.arange(12.0).reshape(4, 3).bfloat16()
    cut = cut_like(saved, parameter)
    assert cut.device.type == "cpu" and cut.dtype == torch.bfloat16
    assert torch.equal(cut.to_local(), saved)
    assert cut.placements == parameter.placements and not cut.requires_grad  # pyright: ignore[reportAttributeAccessIssue]
