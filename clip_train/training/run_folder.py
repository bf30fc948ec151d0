"""runs/<run_name>/: what a run leaves behind."""

import json
import logging
import os
import platform
import subprocess
import sys
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from clip_train.data.files import write_atomic
from clip_train.errors import ConfigError, RunExistsError
from clip_train.training.launch import World, started_by_lightning

# So that the kept config, used as a primary config, leaves no folders of Hydra's about.
_CONFIG_HEADER = """\
defaults:
  - _self_
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
  - override hydra/launcher: local
  - override hydra/sweeper: grid
hydra:
  run:
    dir: .
  sweep:
    dir: ${output_dir}/sweep_${now:%Y-%m-%d_%H-%M-%S}
  output_subdir: null
"""
WANDB_RUN_ID = "wandb_run_id"
_NAME_FOR_CHILDREN = "CLIP_TRAIN_RUN_NAME"
_LIBRARIES = ("clip_train", "torch", "lightning", "timm", "transformers", "webdataset", "hydra-core", "wandb")

log = logging.getLogger(__name__)


class RunFolder:
    """Paths inside one run's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.summary = self.path / "summary.json"
        self.logs = self.path / "logs"
        self.checkpoints = self.path / "checkpoints"
        self.rollback = self.path / "rollback.json"

    def log_of_rank(self, rank: int) -> Path:
        """Where a process logs to; the first one's is in plain sight."""
        return self.logs / f"rank_{rank:05d}.log" if rank else self.path / "train.log"

    @property
    def wandb_run_id(self) -> str | None:
        """The id of this run at W&B, if it is logged there."""
        path = self.path / WANDB_RUN_ID
        return path.read_text().strip() if path.exists() else None

    def check_free_or_resumed(self, resume: str) -> None:
        """Raises RunExistsError if the folder holds a run and `resume` does not say to go on with it."""
        used = self.config.exists() or any(self.checkpoints.glob("*.ckpt"))
        if used and resume == "never":
            raise RunExistsError(
                f"{self.path} already holds a run: add resume=auto to go on with it, or choose another run_name"
            )

    def create(self, config: str) -> None:
        """Make the folder and keep the config in it.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.config, (_CONFIG_HEADER + config).encode())
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}; choose another output_dir") from error

    def is_complete(self, total_samples: int) -> bool:
        """Whether the summary is of the whole of a run of this length, not of a part that was stopped."""
        if not self.summary.exists():
            return False
        summary = self.read_summary()
        return summary["complete"] and summary["samples_seen"] >= total_samples

    def read_summary(self) -> dict:
        """The outcome of a finished run."""
        return json.loads(self.summary.read_text())

    def write_summary(self, summary: dict) -> None:
        """Keep the run's outcome and the environment it had; a full disk does not undo the run."""
        text = json.dumps({**summary, "environment": environment()}, indent=2) + "\n"
        try:
            write_atomic(self.summary, text.encode())
        except OSError as error:
            log.error("CANNOT WRITE %s: %s; it would say: %s", self.summary, error.strerror, text)


def default_run_name(model_name: str, world: World) -> str:
    """The same name on every rank, before they are connected: the time where that can be shared, else the job.

    Raises:
        ConfigError: the processes were started in a way that tells them nothing in common.
    """
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{model_name}"
    env = os.environ
    if world.size == 1:
        return name
    if isinstance(world.environment, TorchElasticEnvironment):
        run_id = env["TORCHELASTIC_RUN_ID"]
        if run_id != "none":  # --rdzv-id, or what --standalone made up
            return f"{run_id}_{model_name}".replace("/", "_")
        if world.stores:  # the name that some rank was the first to propose
            return world.stores.agent.compare_set("run_name", "", name).decode()
    elif isinstance(world.environment, SLURMEnvironment):
        return f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}_{model_name}"
    elif "LOCAL_RANK" not in env and world.size == world.devices:
        env[_NAME_FOR_CHILDREN] = name  # Lightning starts the others from this process
        return name
    elif _NAME_FOR_CHILDREN in env and started_by_lightning():
        return env[_NAME_FOR_CHILDREN]
    raise ConfigError("the processes cannot agree on a run_name, as they were started apart: give run_name=NAME to all")


def environment() -> dict[str, str | int | bool]:
    """Versions, code and machine, for the record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": sys.version.split()[0],
        **{library: version(library) for library in _LIBRARIES},
        **_git_state(Path(__file__).parent),
        "host": platform.node(),
        "device": device,
        "cpus": os.cpu_count() or 1,
    }


@cache
def _git_state(code: Path) -> dict[str, str | bool]:
    """The commit that the code is of and whether it was changed since; nothing if it is not in a checkout."""
    tracked = _git(code, "ls-files", "--error-unmatch", Path(__file__).name)  # not just inside somebody's checkout
    commit = _git(code, "rev-parse", "HEAD") if tracked else None
    if not commit:
        return {}
    changes = _git(code, "status", "--porcelain", "--untracked-files=no", "--", ":/")
    return {"git_commit": commit, "git_dirty": changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
