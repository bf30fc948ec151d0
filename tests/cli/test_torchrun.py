"""torchrun starts all ranks again when one has died, and the run goes on from its last checkpoint."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from clip_train.training.callbacks.sample_log import read_sample_log
from tests.cli.runs import TINY, clip_train
from tests.cli.test_train import wait_for_rows

RUN = [*TINY, "data.val.shards=null", "data.num_workers=0", "data.sample_log=true", "trainer.log_every=1"]
RUN += ["max_steps=40", "checkpoint.every=5", "run_name=run"]
SLOW = ["loss._target_=tests.slurm.slow_loss.slow_contrastive_loss", "+loss.seconds=0.2"]


def test_a_rank_that_is_killed_costs_the_steps_since_the_last_checkpoint(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    nodes = [start_node(node, port, tmp_path / "torchrun") for node in (0, 1)]
    run = tmp_path / "torchrun" / "run"
    wait_for_rows(run / "metrics.csv", 8)
    os.kill(rank_of(nodes[1]), signal.SIGKILL)
    outputs = [node.communicate(timeout=900)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)

    resumed_at = re.findall(r"resumed +at ([\d,]+) samples", outputs[0])
    assert len(resumed_at) == 1
    assert 0 < int(resumed_at[0].replace(",", "")) < 40 * 32
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["complete"], summary["world_size"]) == (True, 2)
    undisturbed = clip_train(*RUN, f"output_dir={tmp_path / 'undisturbed'}")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert read_sample_log(run / "samples") == read_sample_log(tmp_path / "undisturbed" / "run" / "samples")


def start_node(node: int, port: int, output_dir: Path) -> subprocess.Popen:
    """What torchrun runs on one of two nodes, with one rank."""
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    torchrun += [f"--node-rank={node}", "--rdzv-backend=c10d", "--rdzv-id=run", f"--rdzv-endpoint=localhost:{port}"]
    program = ["-m", "clip_train.commands.train", *RUN, *SLOW, "resume=auto", f"output_dir={output_dir}"]
    return subprocess.Popen(
        [sys.executable, *torchrun, *program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rank_of(node: subprocess.Popen) -> int:
    """The process that trains."""
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    return next(int(child) for child in children if b"clip_train.commands.train" in command_of(child))


def command_of(process: str) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()
