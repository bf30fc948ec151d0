"""Trains one config after another in the same processes: `torchrun ... -m tests.distributed.train_many OUT RUN...`.

OUT is a folder, a RUN is `name override override ...` in one argument. Each leaves its run folder in OUT.
"""

import json
import os
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from clip_train.commands.program import config_dir
from clip_train.training.module import ClipModule
from clip_train.training.run import train
from tests.cli.runs import TINY
from tests.cli.warm_start import run_module

COUNTED = 8  # counting is slow
FIXED = ("experiment=demo", *TINY, "max_epochs=null", "model.text.width=32", "data.val.shards=null")


def train_on(ranks: int, folder: Path, *runs: str) -> None:
    """Train these runs in `folder` on so many ranks."""
    done = run_module("tests.distributed.train_many", [str(folder), *runs], os.environ, 900, ranks)
    assert done.returncode == 0, done.stdout + done.stderr


def main(output_dir: str, *runs: str) -> None:
    for run in runs:
        name, *overrides = run.split()
        cfg = compose_run("train", f"output_dir={output_dir}", f"run_name={name}", *overrides)
        counts = count_gradient_exchanges()
        train(cfg, Console(quiet=True))
        Path(output_dir, name, "exchanges.json").write_text(json.dumps(counts))
        Path(output_dir, name, "static_graph.json").write_text(json.dumps(counts.of_static_graphs))


def compose_run(program: str, *overrides: str) -> DictConfig:
    """The config of such a run, as `train` or `plan` would compose it."""
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose(program, [*FIXED, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


class CountCollectives(TorchDispatchMode):
    """Counts the all-reduces that are started inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.c10d.allreduce_.default
        return func(*args, **(kwargs or {}))


class Exchanges(list[int]):
    """How many all-reduces each of the first backward passes makes, and whether DDP took its graph for static."""

    def __init__(self) -> None:
        super().__init__()
        self.of_static_graphs: list[bool] = []


def count_gradient_exchanges() -> Exchanges:
    """They are DDP's, as the losses make none backward."""
    counts = Exchanges()
    backward = ClipModule.manual_backward

    def counted(self: ClipModule, loss: torch.Tensor, *args, **kwargs) -> None:
        if len(counts) == COUNTED:
            return backward(self, loss, *args, **kwargs)
        with CountCollectives() as collectives:
            backward(self, loss, *args, **kwargs)
        counts.append(collectives.count)
        counts.of_static_graphs.append(getattr(self.trainer.strategy.model, "static_graph", False))

    ClipModule.manual_backward = counted
    return counts


if __name__ == "__main__":
    main(*sys.argv[1:])
