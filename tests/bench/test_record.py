"""Records of benchmarks, which several commands write together."""

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def record(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module("record")


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]


def test_rows_of_several_commands_are_joined(record, tmp_path):
    path = tmp_path / "new" / "step.md"
    machines = {"one": "- memory: 1 GiB\n", "other": "- memory: 2 GiB\n"}

    def add(machine: str, *rows: dict[str, str]) -> None:
        record.add_rows(path, "# Steps\n\nMedians.", machine, machines[machine], rows, ("model", "batch"))

    add("one", {"model": "b", "batch": "32", "s": "3.1", "measured": "Monday"})
    add("other", {"model": "b", "batch": "32", "s": "9.9", "measured": "Monday"})
    path.write_text(path.read_text().replace("## other", "By hand | and wide.\n\n## other"))
    add("one", {"model": "b", "batch": "128", "s": "12.0", "main": "0.8", "measured": "Friday"})
    before = path.read_text()
    add("one", {"model": "b", "batch": "32", "s": "3.0", "measured": "Friday"}, {"model": "a", "batch": "8", "s": ""})
    one, other = path.read_text().split("\n## other\n")
    assert one.startswith(
        "# Steps\n\nMedians.\n\n## one\n\n- memory: 1 GiB\n\n| model | batch | s | main | measured |\n"
    )
    assert table(one)[2:] == [
        ["a", "8", "", "", ""],
        ["b", "32", "3.0", "", "Friday"],
        ["b", "128", "12.0", "0.8", "Friday"],
    ]
    assert one.endswith("|\n\nBy hand | and wide.\n")
    assert other == before.split("\n## other\n")[1]
    assert table(other)[2:] == [["b", "32", "9.9", "Monday"]]


# Stands for Python in gpu.sh: the programs that would need a GPU are a few words here.
PYTHON = f"""#!/bin/bash
case "$1" in
    -) echo "Fake GPU 9" ;;
    scripts/bench/part.py) exec {sys.executable} "$@" ;;
    scripts/bench/loss_gpu.py) printf '# Heading\\n\\n| loss |\\n| --- |\\n| %s |\\n' "$LOSS"; sleep "$SLEEP" ;;
    scripts/bench/attention.py) echo "| half |"; echo "no kernel" >&2; exit 3 ;;
    scripts/bench/step_sweep.py) echo "$@" ;;
esac
"""


def started(folder: Path, **settings: str) -> subprocess.Popen[str]:
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "LOSS": "1", "SLEEP": "0"} | settings
    command = [str(SCRIPTS / "gpu.sh"), str(folder / "out")]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, stdout=pipe, stderr=pipe)


def gpu(folder: Path, **settings: str) -> tuple[int, str]:
    """Its exit code and complaints."""
    with started(folder, **settings) as program:
        complaints = program.communicate()[1]
        return program.returncode, complaints


def test_parts_of_a_gpu_are_measured_again_alone(tmp_path):
    assert gpu(tmp_path, PARTS="loss attention")[0] == 1
    path = tmp_path / "out" / "fake_gpu_9.md"
    first = path.read_text()
    assert first.startswith("# Fake GPU 9\n\n## Loss\n\n### Heading\n\n| loss |")
    assert "| half |" in first and "failed, with exit code 3:\n\n```\nno kernel\n```" in first
    assert gpu(tmp_path, PARTS="loss step", LOSS="2", MODELS="vit_b_32", SHARDS="/data/*.tar")[0] == 0
    again = path.read_text()
    assert again.split("## Attention")[1].startswith(first.split("## Attention")[1].rstrip())
    assert "| 2 |" in again and "| 1 |" not in again
    assert "## Step of vit_b_32\n" in again and "--shards /data/*.tar" in again
    assert list(path.parent.iterdir()) == [path]


def test_a_part_that_is_killed_leaves_what_it_had_printed(tmp_path):
    path = tmp_path / "out" / "fake_gpu_9.md"
    with started(tmp_path, PARTS="loss", SLEEP="600") as program:
        while not (path.exists() and "| 1 |" in path.read_text()):
            assert program.poll() is None
            time.sleep(0.05)
        os.killpg(program.pid, signal.SIGKILL)
    assert path.read_text().endswith("| 1 |\n\nNot finished.\n")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PARTS": "lunch"}, "error: PARTS has no lunch"),
        ({"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}, "sees no CUDA GPU here"),
        ({"PYTHON": "/nowhere/python"}, "/nowhere/python"),
    ],
)
def test_what_gpu_sh_refuses(settings, said, tmp_path):
    code, complaints = gpu(tmp_path, **settings)
    assert (code, complaints.count("\n")) == (2, 1) and said in complaints
    assert not (tmp_path / "out").exists()
