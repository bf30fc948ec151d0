"""The command line on a tiny model, in a process of its own."""

import os
import subprocess
import time
from pathlib import Path

from clip_train.training.csv_logger import read_metrics
from tests.cli.warm_start import run_module

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


def clip_train(*arguments: str, launcher: tuple[str, ...] = (), timeout: float = 300, **env: str):
    """Run `clip-train`; returns the finished process with its output as text."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    if not launcher:
        return run_module("clip_train.commands.train", arguments, env, timeout)
    command = [*launcher, "-m", "clip_train.commands.train", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def train_tiny(
    output_dir: Path, run_name: str, *arguments: str, launcher: tuple[str, ...] = ()
) -> list[dict[str, str]]:
    """Train and return the rows of metrics.csv that have a training loss."""
    done = clip_train(*TINY, f"output_dir={output_dir}", f"run_name={run_name}", *arguments, launcher=launcher)
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
