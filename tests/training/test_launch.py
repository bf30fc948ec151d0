import os

import pytest

from clip_train.errors import ConfigError
from clip_train.training.launch import cpus_per_process, find_world, num_workers

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "4",
}


@pytest.fixture
def set_env(monkeypatch):
    for name in {*TORCHRUN, *SRUN, "NODE_RANK", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_ON_NODE"}:
        monkeypatch.setenv(name, "")  # so that it is restored, whatever the code sets
        monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]


def test_alone(set_env):
    world = find_world("cpu", "auto", 1)
    assert (world.devices, world.size, world.rank) == (1, 1, 0)
    assert not world.environment.creates_processes_externally


@pytest.mark.parametrize(("variables", "rank"), [(TORCHRUN, 3), (SRUN, 2)])
def test_launchers(set_env, variables, rank):
    set_env(variables)
    world = find_world("cpu", "auto", 1)
    assert (world.devices, world.num_nodes, world.size, world.rank) == (2, 2, 4, rank)
    assert world.environment.creates_processes_externally
    assert find_world("cpu", 2, 1).size == 4
    with pytest.raises(ConfigError, match="leave it at auto"):
        find_world("cpu", 3, 1)


def test_a_batch_script_without_srun_is_alone(set_env):
    set_env({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert find_world("cpu", "auto", 1).size == 1


def test_started_by_lightning(set_env):
    set_env({"LOCAL_RANK": "1"})
    assert find_world("cpu", 4, 1).rank == 1


@pytest.mark.parametrize("devices", [0, -1, "two", 1.5])
def test_impossible_devices(set_env, devices):
    with pytest.raises(ConfigError, match=r"trainer\.devices"):
        find_world("cpu", devices, 1)


@pytest.mark.parametrize(
    ("variables", "own", "expected"),
    [
        (SRUN | {"SLURM_CPUS_ON_NODE": "16"}, 8, 8),  # bound by srun to CPUs of its own
        (SRUN | {"SLURM_CPUS_ON_NODE": "16"}, 16, 8),  # not bound
        (SRUN, 8, 4),  # of a scheduler that does not say: nothing but one's own is known
        (TORCHRUN, 8, 8),  # bound by torchrun, which may use 16
        (TORCHRUN, 16, 8),
        ({}, 8, 4),  # Lightning's processes all run where the first one may
    ],
)
def test_a_process_counts_its_share_of_the_cpus_once(set_env, monkeypatch, variables, own, expected):
    set_env(variables)
    usable = {0: set(range(own)), os.getppid(): set(range(16))}
    monkeypatch.setattr(os, "sched_getaffinity", usable.get)
    world = find_world("cpu", 2, 1)
    assert cpus_per_process(world) == num_workers("auto", world, "data.num_workers") == expected
