"""State sharded by FSDP2 over several ranks, read on any number of them."""

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from clip_train.checkpoints.folder import list_checkpoints, read_checkpoint
from clip_train.checkpoints.retention import Retention
from clip_train.checkpoints.snapshot import SnapshotTaker
from clip_train.checkpoints.writer import CheckpointWriter
from tests.checkpoints.states import assert_equal, make_model, make_state, state_of, train_a_little
from tests.ranks import run_on_ranks


def save_sharded(folder: Path, mesh_shape: tuple[int, ...]) -> int:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    model = make_model()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
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
