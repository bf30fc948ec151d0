"""Programs in processes that have their libraries already: forked from a server that has imported and no more.

A fresh process needs 13 s of processor time to import torch, Lightning, timm and transformers; tests start hundreds.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["clip_train.training.run", "clip_train.evaluation.picture", "tests.conftest", __name__])


class WarmProcess:
    """`python -m module arguments`, or `python FILE.py arguments`, with what tests use of subprocess.Popen.

    Its output is there when it has ended.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], env: Mapping[str, str], *, start_new_session: bool = False
    ) -> None:
        self.args = [sys.executable, "-m", module, *arguments]
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self._texts: list[str] = []
        out, err = (_Descriptor(file.fileno()) for file in self._files)
        work = (module, list(arguments), dict(env), os.getcwd(), out, err, start_new_session)
        self._process = context.Process(target=_run, args=work)
        self._process.start()
        atexit.register(self.kill)  # a test that failed may have left it; multiprocessing would wait for it at the end

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def sentinel(self) -> int:
        return self._process.sentinel

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """
        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        atexit.unregister(self.kill)  # which would keep this object, and its files open, to the end of all tests
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Its output and errors, when it has ended."""
        self.wait(timeout)
        for file in self._files:
            with file:
                file.seek(0)
                self._texts.append(file.read().decode(errors="replace"))
        self._files = []
        return self._texts[0], self._texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_ranks(ranks: int, module: str, arguments: Sequence[str], env: Mapping[str, str]) -> list[WarmProcess]:
    """One process, or several with the variables of torchrun."""
    worlds = [{}] if ranks == 1 else _variables_of_torchrun(ranks)
    return [WarmProcess(module, arguments, {**env, **variables}) for variables in worlds]


def run_module(module: str, arguments: Sequence[str], env: Mapping[str, str], timeout: float, ranks: int = 1):
    """`python -m module arguments`; returns the finished process with its output as text.

    Args:
        ranks: processes, see start_ranks. Their output is one after the other, the exit status that of the first rank
            that has failed.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds, and was killed.
    """
    processes = start_ranks(ranks, module, arguments, env)
    try:
        _wait_for_all(processes, timeout)
    finally:
        for process in processes:
            process.kill()
    outputs, errors = zip(*(process.communicate() for process in processes), strict=True)
    status = next((process.returncode for process in processes if process.returncode), 0)
    return subprocess.CompletedProcess(processes[0].args, status, "".join(outputs), "".join(errors))


def _wait_for_all(processes: list[WarmProcess], timeout: float) -> None:
    """Until they have ended; those that wait for one that has failed get half a minute."""
    end = time.monotonic() + timeout
    failed_at = None
    while running := [process for process in processes if process.poll() is None]:
        if failed_at is None and any(process.returncode for process in processes):
            failed_at = time.monotonic()
            end = min(end, failed_at + 30)
        if time.monotonic() > end:
            if failed_at is not None:
                return
            raise subprocess.TimeoutExpired(processes[0].args, timeout)
        connection.wait([process.sentinel for process in running], max(0, end - time.monotonic()))


def _variables_of_torchrun(ranks: int) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    same = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    same |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    each = [{**same, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{name: str(value) for name, value in variables.items()} for variables in each]


class _Descriptor:
    """An open file that travels to the process that is started."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self):
        from multiprocessing.reduction import DupFd

        return _detach, (DupFd(self.number),)


def _detach(duplicate) -> int:
    return duplicate.detach()


def _run(
    module: str, arguments: list[str], env: dict[str, str], folder: str, out: int, err: int, new_session: bool
) -> None:
    if new_session:
        os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv[1:] = arguments
    multiprocessing.set_start_method(None, force=True)  # a child of a server would start a server for loader workers
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves without
        sys.stdout.flush()
