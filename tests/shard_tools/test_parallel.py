import os
import signal
import subprocess
import sys
import time

import pytest

from clip_train.errors import ClipTrainError, ConfigError
from clip_train.shard_tools.parallel import count_workers, run_parallel

_SLEEPING_PARENT = """
import os
from tests.shard_tools.test_parallel import print_and_sleep
from clip_train.shard_tools.parallel import run_parallel
if __name__ == "__main__":
    list(run_parallel(print_and_sleep, range(2), 2))
"""


def double(number: int) -> int:
    return 2 * number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


def end_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def print_and_sleep(_: int) -> None:
    os.write(1, f"{os.getpid()}\n".encode())
    time.sleep(600)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_all_results_come(num_workers):
    assert sorted(run_parallel(double, iter(range(50)), num_workers)) == list(range(0, 100, 2))
    assert list(run_parallel(double, [], num_workers)) == []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_exception_comes_through(num_workers):
    with pytest.raises(ValueError, match="three"):
        list(run_parallel(fail_at_three, range(1000), num_workers))


def test_a_killed_worker_is_an_error():
    with pytest.raises(ClipTrainError, match="killed"):
        list(run_parallel(end_at_three, range(1000), 2))


def test_workers_end_when_their_parent_is_killed():
    process = subprocess.Popen([sys.executable, "-c", _SLEEPING_PARENT], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < end, "a worker outlived its parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_numbers_of_workers():
    assert count_workers("auto") >= 1
    assert count_workers(3) == 3
    for value in (0, -1, "many", True, 1.5):
        with pytest.raises(ConfigError, match="num_workers="):
            count_workers(value)
