"""The command line on a tiny model, in a process of its own."""

import os
import subprocess
import time
from pathlib import Path

from clip_train.training.loggers.csv_logger import read_metrics
from tests.cli.warm_start import WarmProcess, run_module

TINY = [
    "model=vit_tiny",
    "model.image_size=32",
    "model.vision.options={patch_size: 16, embed_dim: 64, depth: 2, num_heads: 2}",
    "model.text={width: 64, layers: 2, heads: 2, context_length: 16}",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "eval.every=null",
    "eval.report=false",
    "batch_size=32",
]


def clip_train(
    *arguments: str, launcher: tuple[str, ...] = (), ranks: int = 1, timeout: float = 900, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run `clip-train`, on several ranks as torchrun starts them; returns the finished process with its output as text.

    Args:
        launcher: a program that starts it anew, in place of a process that has its libraries already.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    if not launcher:
        return run_module("clip_train.commands.train", arguments, env, timeout, ranks)
    command = [*launcher, "-m", "clip_train.commands.train", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def start_clip_train(*arguments: str, **env: str) -> WarmProcess:
    """Start `clip-train`, to send it signals; its process group is that of its number, and has all that it starts."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return WarmProcess("clip_train.commands.train", arguments, env, start_new_session=True)


def train_tiny(
    output_dir: Path, run_name: str, *arguments: str, launcher: tuple[str, ...] = (), ranks: int = 1
) -> list[dict[str, str]]:
    """Train and return the rows of metrics.csv that have a training loss."""
    run = (*TINY, f"output_dir={output_dir}", f"run_name={run_name}", *arguments)
    done = clip_train(*run, launcher=launcher, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    _, rows = read_metrics(output_dir / run_name / "metrics.csv")
    return [row for row in rows if row["train/loss"]]


def group_is_gone(process_group: int, seconds: float = 30) -> bool:
    """Whether nothing is left of a process group; what is ending gets some time for it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(process_group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
