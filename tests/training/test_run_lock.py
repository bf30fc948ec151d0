import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clip_train.errors import RunExistsError
from clip_train.training.run_lock import lock_run

LOCK = "from pathlib import Path; from clip_train.training.run_lock import lock_run; import sys, os, signal\n"
LOCK += "lock_run(Path(sys.argv[1]))\nprint('locked', flush=True)\n"
HOLD = "sys.stdin.read()\n"
FORK = "child = os.fork()\nif child == 0: signal.pause()\nprint(child, flush=True)\nos._exit(1)\n"


def start(folder: Path, program: str) -> subprocess.Popen:
    command = [sys.executable, "-c", LOCK + program, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "locked\n"
    return process


def test_one_process_at_a_time(tmp_path):
    process = start(tmp_path / "run", HOLD)
    with pytest.raises(RunExistsError, match=f"run is being trained by process {process.pid} on "):
        lock_run(tmp_path / "run")
    lock_run(tmp_path / "other")
    process.kill()
    process.communicate()
    lock_run(tmp_path / "run")
    lock_run(tmp_path / "run")  # it goes back to a checkpoint
    assert f"process {os.getpid()} " in (tmp_path / "run" / ".lock").read_text()
    other = subprocess.run([sys.executable, "-c", LOCK, tmp_path / "run"], capture_output=True, text=True, check=False)
    assert "RunExistsError" in other.stderr  # the second time did not let go of it


def test_it_waits_for_one_that_is_ending(tmp_path):
    process = start(tmp_path, "import time; time.sleep(2)\n")
    lock_run(tmp_path, patience=100)
    assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
    process.communicate()
    assert process.returncode == 0


def test_a_forked_worker_that_is_left_does_not_keep_it(tmp_path):
    process = start(tmp_path, FORK)
    assert process.stdout
    child = int(process.stdout.readline())
    process.wait()
    try:
        lock_run(tmp_path, patience=60)  # until the child has come to let go of it
        os.kill(child, 0)
    finally:
        os.kill(child, 9)
        process.communicate()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock_run(tmp_path)
    assert "cannot be locked (No locks available)" in caplog.text
