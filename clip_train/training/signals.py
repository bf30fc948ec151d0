"""The signals that end a run in good order: SIGTERM, SIGUSR1 (a scheduler's warning of the time limit) and SIGINT.

A handler only takes note. What follows happens where all ranks can agree on it: `agreement.py`. Imports nothing but the
standard library, as a program installs the handlers before it does anything else.
"""

import os
import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_SECONDS_TO_END = 15.0

_received: signal.Signals | None = None


def install_handlers() -> None:
    """From now on a signal asks the run to stop, instead of ending the process; a second SIGINT ends it at once."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, _note)


def stop_requested() -> signal.Signals | None:
    """The first signal this process got, if it got one."""
    return _received


def ignore_signals() -> None:
    """When nothing is left to stop: Python resets the handlers before it exits, and the exit code could be lost."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def keep_handlers(trainer) -> None:
    """Let a Lightning Trainer install none of its own: they broadcast and save in the middle of a step.

    Nor ask before each step whether they were called, by a broadcast that waits for the device to end the step before:
    ranks agree on signals through the host (`RankAgreement`).
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None:
        if number == signal.SIGINT:
            _end_soon()
            raise KeyboardInterrupt
        return
    _received = signal.Signals(number)
    if _is_first_process():
        again = "; once more stops it at once" if number == signal.SIGINT else ""
        os.write(2, f"{_received.name}: the run stops after this step, with a checkpoint{again}\n".encode())


def _end_soon() -> None:
    """End the process, whatever it waits for on its way out."""
    timer = threading.Timer(_SECONDS_TO_END, os._exit, [128 + signal.SIGINT])
    timer.daemon = True
    timer.start()


def _is_first_process() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
