"""runs/<run_name>/: what a run leaves behind."""

import json
import logging
import os
import platform
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

from clip_train.data.files import write_atomic
from clip_train.errors import ConfigError, RunExistsError

# So that the kept config, used as a primary config, leaves no folders of Hydra's about.
_CONFIG_HEADER = """\
defaults:
  - _self_
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
hydra:
  run:
    dir: .
  sweep:
    dir: ${output_dir}/sweep_${now:%Y-%m-%d_%H-%M-%S}
  output_subdir: null
"""
_LIBRARIES = ("clip_train", "torch", "lightning", "timm", "transformers", "webdataset", "hydra-core")


class RunFolder:
    """Paths inside one run's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.summary = self.path / "summary.json"
        self.log = self.path / "train.log"
        self.checkpoints = self.path / "checkpoints"

    def check_free_or_resumed(self, resume: str) -> None:
        """Raises RunExistsError if the folder holds a run and `resume` does not say to go on with it."""
        if self.config.exists() and resume == "never":
            raise RunExistsError(
                f"{self.path} already holds a run: add resume=auto to go on with it, or choose another run_name"
            )

    def checkpoint_to_resume(self, resume: str) -> Path | None:
        """The checkpoint that `resume` (`auto`, `never` or a path) means; None for a fresh start.

        Raises:
            ConfigError: the path does not exist.
        """
        if resume == "never":
            return None
        if resume == "auto":
            return max(self.checkpoints.glob("*.ckpt"), default=None)  # names sort by samples seen
        if not Path(resume).is_file():
            raise ConfigError(f"resume={resume}: no such checkpoint; give a file, auto or never")
        return Path(resume)

    def create(self, config: str) -> None:
        """Make the folder, keep the config in it, and copy the log of this process to `train.log`.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.config, (_CONFIG_HEADER + config).encode())
            handler = logging.FileHandler(self.log)
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}; choose another output_dir") from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("clip_train")
        for old in [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]:
            logger.removeHandler(old)  # of the sweep's previous run
        logger.addHandler(handler)

    def read_summary(self) -> dict:
        """The outcome of a finished run."""
        return json.loads(self.summary.read_text())

    def write_summary(self, summary: dict) -> None:
        """Keep the run's outcome and the environment it had."""
        write_atomic(self.summary, (json.dumps({**summary, "environment": environment()}, indent=2) + "\n").encode())


def default_run_name(model_name: str) -> str:
    """A name that sorts by time."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{model_name}"


def environment() -> dict[str, str | int]:
    """Versions and machine, for the record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "python": sys.version.split()[0],
        **{library: version(library) for library in _LIBRARIES},
        "host": platform.node(),
        "device": device,
        "cpus": os.cpu_count() or 1,
    }
