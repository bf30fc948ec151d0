"""Programs in processes that have their libraries already: forked from a server that has imported and no more.

A fresh process needs some seconds to import torch, Lightning, timm and transformers; tests start hundreds.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["clip_train.training.run", "clip_train.evaluation.picture", __name__])


def run_module(module: str, arguments: Sequence[str], env: Mapping[str, str], timeout: float):
    """`python -m module arguments`; returns the finished process with its output as text.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds, and was killed.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files = [_Descriptor(file.fileno()) for file in (out, err)]
        process = _context.Process(target=_run, args=(module, list(arguments), dict(env), os.getcwd(), *files))
        process.start()
        process.join(timeout)
        command = [sys.executable, "-m", module, *arguments]
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return subprocess.CompletedProcess(command, process.exitcode, *texts)


class _Descriptor:
    """An open file that travels to the process that is started."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self):
        from multiprocessing.reduction import DupFd

        return _detach, (DupFd(self.number),)


def _detach(duplicate) -> int:
    return duplicate.detach()


def _run(module: str, arguments: list[str], env: dict[str, str], folder: str, out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv[1:] = arguments
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves without
        sys.stdout.flush()
