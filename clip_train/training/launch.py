"""Who starts the processes, and which of them this one is."""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch.distributed.constants import default_pg_timeout

from clip_train.distributed import host_group
from clip_train.errors import ConfigError
from clip_train.processes import die_with_parent
from clip_train.training import torchrun

_ACCELERATORS = ("auto", "cpu", "gpu")
_MOST_WORKERS = 8


@dataclass(frozen=True)
class World:
    """The processes of a run, known before they are connected.

    Attributes:
        accelerator: `cpu` or `gpu`.
        devices: processes per node.
        environment: tells Lightning how the processes were started.
        stores: of torchrun, where it started them.
    """

    accelerator: str
    devices: int
    num_nodes: int
    rank: int
    environment: ClusterEnvironment
    stores: torchrun.Stores | None = None

    @property
    def size(self) -> int:
        return self.devices * self.num_nodes


def find_world(accelerator: str, devices: int | str, num_nodes: int) -> World:
    """Read the launcher's variables (torchrun, srun), or plan `devices` processes that Lightning will start.

    Args:
        accelerator: `auto` takes a GPU if there is one.
        devices: processes per node; `auto` is what the launcher started, else one per GPU, else one.
        num_nodes: nodes of the run.

    Raises:
        ConfigError: `devices` and `num_nodes` contradict the launcher, or there are not so many devices.
    """
    if accelerator not in _ACCELERATORS:
        raise ConfigError(f"trainer.accelerator={accelerator} is none of {', '.join(_ACCELERATORS)}")
    if not isinstance(num_nodes, int) or num_nodes < 1:
        raise ConfigError(f"trainer.num_nodes={num_nodes} is not a positive number")
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if devices != "auto" and (not isinstance(devices, int) or devices < 1):
        raise ConfigError(f"trainer.devices={devices} is neither a positive number nor auto")
    env = os.environ
    if TorchElasticEnvironment.detect():
        local, size, rank = int(env["LOCAL_WORLD_SIZE"]), int(env["WORLD_SIZE"]), int(env["RANK"])
        _check_launcher("torchrun", devices, local)
        return World(accelerator, local, size // local, rank, TorchElasticEnvironment(), torchrun.meet(rank, size))
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # inside srun, not just a batch script
        size, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_STEP_NUM_NODES"])
        if size % nodes:
            raise ConfigError(f"srun started {size} tasks on {nodes} nodes: start equally many on each")
        _check_launcher("srun", devices, size // nodes)
        env.setdefault("SLURM_NTASKS_PER_NODE", str(size // nodes))  # Lightning insists, even for a plain `srun -n`
        environment = SLURMEnvironment(auto_requeue=False)
        return World(accelerator, size // nodes, nodes, int(env["SLURM_PROCID"]), environment)
    available = torch.cuda.device_count() if accelerator == "gpu" else None
    if devices == "auto":
        devices = available or 1
    if available is not None and devices > available:
        raise ConfigError(f"trainer.devices={devices}, but this machine has {available} GPU(s)")
    rank = int(env.get("NODE_RANK", "0")) * devices + int(env.get("LOCAL_RANK", "0"))
    return World(accelerator, devices, num_nodes, rank, LightningEnvironment())


def started_by_lightning() -> bool:
    """Whether this process is one of those that `trainer.devices` made the first process start."""
    return int(os.environ.get("LOCAL_RANK", "0")) > 0 and not TorchElasticEnvironment.detect()


def join_ranks(world: World, host_timeout: timedelta = default_pg_timeout) -> torch.device:
    """Start the processes that no launcher has started, connect all, and tell this one's device.

    For programs without a Trainer, which does this for training.

    Args:
        host_timeout: how long a rank may wait for what the others' hosts say, as `agreed` does. On GPUs, what they
            compute together has a limit of its own, so that none waits for one that is gone.
    """
    if started_by_lightning():
        die_with_parent()
    for part in ("fabric", "pytorch"):  # which of the two announces the processes depends on what was imported
        logging.getLogger(f"lightning.{part}").setLevel(logging.WARNING)
    # Processors have one group for both; there, a process that is gone closes its connections.
    timeout = host_timeout if world.accelerator == "cpu" else default_pg_timeout
    fabric = Fabric(
        accelerator=world.accelerator,
        devices=world.devices,
        num_nodes=world.num_nodes,
        strategy="auto" if world.size == 1 else DDPStrategy(timeout=timeout),
        plugins=[world.environment],
    )
    fabric.launch()
    if world.size > 1:
        host_group(timeout=host_timeout)
    return fabric.device


def _check_launcher(launcher: str, devices: int | str, local: int) -> None:
    if devices not in ("auto", local):
        raise ConfigError(
            f"trainer.devices={devices}, but {launcher} started {local} process(es) per node: leave it at auto"
        )


def cpus_per_process(world: World) -> int:
    """CPUs that this process may use, its neighbours' share left out.

    A launcher may have bound each process to CPUs of its own, or several to those near their GPUs.
    """
    return max(1, min(_usable_cpus(), _cpus_of_node(world) // world.devices))


def _cpus_of_node(world: World) -> int:
    """That all processes of this node have between them."""
    if isinstance(world.environment, SLURMEnvironment):
        return int(os.environ.get("SLURM_CPUS_ON_NODE", _usable_cpus()))
    if isinstance(world.environment, TorchElasticEnvironment):
        return _usable_cpus(os.getppid())  # torchrun, which starts all of them
    return _usable_cpus()


def _usable_cpus(process: int = 0) -> int:
    """That a process, or this one (0), may run on."""
    return len(os.sched_getaffinity(process)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_workers(setting: int | str, world: World, key: str) -> int:
    """Loader processes of a rank; `auto` is as many as there are processors, at most 8.

    Args:
        key: where the setting is in the config.

    Raises:
        ConfigError: it is neither a number nor `auto`.
    """
    if setting == "auto":
        return min(_MOST_WORKERS, cpus_per_process(world))
    if not isinstance(setting, int) or setting < 0:
        raise ConfigError(f"{key}={setting} is neither a number nor auto")
    return setting
