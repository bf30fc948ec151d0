import pytest

from clip_train.errors import ConfigError
from clip_train.training.launch import find_world

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
    for name in {*TORCHRUN, *SRUN, "NODE_RANK", "SLURM_NTASKS_PER_NODE"}:
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
