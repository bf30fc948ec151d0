import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.runs import clip_train
from tests.slurm.jobs import ROOT, RUN, samples_of

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


@pytest.fixture(scope="session")
def node():
    """A cluster of node1 and node2; `node("crash", "node2")` and `node("revive", "node2")` do that to one."""
    missing = [name for name in _PROGRAMS if not shutil.which(name)]
    if missing or os.geteuid():
        reason = f"Debian's slurm-wlm and munge are not installed: no {missing[0]}" if missing else "needs root"
        (pytest.fail if os.environ.get("CLIP_TRAIN_REQUIRE_SLURM") else pytest.skip)(reason)
    program = ROOT / "slurm" / "local_cluster"
    started = subprocess.run([program, "start"], capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    os.environ["SLURM_CONF"] = started.stdout.strip().partition("=")[2]
    yield lambda *arguments: subprocess.run([program, *arguments], check=True)
    folder = Path(os.environ["SLURM_CONF"]).parent
    subprocess.run([program, "stop"], check=True)
    del os.environ["SLURM_CONF"]
    assert not folder.exists()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> list[list[str]]:
    """What each step of a run trains on that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = clip_train(*RUN, f"output_dir={folder}", "run_name=run", "max_steps=400")
    assert done.returncode == 0, done.stderr
    return samples_of(folder / "run")
