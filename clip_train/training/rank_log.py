"""The log of each process: what it says, what libraries warn of, and what it dies of."""

import logging
import os
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_train.errors import ClipTrainError
from clip_train.training.loggers.patient_writer import PatientWriter, append_whole

# The root, and those that have handlers of their own or do not pass their records on to it.
_LOGGERS = ("", "clip_train", "lightning", "lightning.pytorch", "lightning.fabric", "torch", "transformers")


class RankLog(logging.Handler):
    """Writes the records of this process to its file; keeps them until it is told which.

    A full disk does not end the run: the lines wait in memory.

    Args:
        rank: of this process; on every line.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.addFilter(_worth_reading)
        self.setFormatter(logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(message)s"))
        self._early: list[str] = []
        self._writer: PatientWriter[str] | None = None

    def open(self, path: Path) -> None:
        """Append to this file from now on, beginning with what was said so far."""
        self._writer = PatientWriter(path, lambda lines: append_whole(path, "".join(lines).encode(errors="replace")))
        self._writer.add(self._early)
        self._note(f"process {os.getpid()} on {socket.gethostname()}", logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        if self._writer:
            self._writer.add([line])
        else:
            self._early.append(line)

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Note the exception that ends what is inside; the terminal hears of it from whoever catches it."""
        try:
            yield
        except ClipTrainError as error:
            self._note(str(error))
            raise
        except BaseException:
            self._note(traceback.format_exc())
            raise

    def _note(self, message: str, level: int = logging.CRITICAL) -> None:
        self.handle(logging.LogRecord("clip_train", level, __file__, 0, message, None, None))


def start_rank_log(rank: int) -> RankLog:
    """Collect this process's records from all loggers; the first rank's go to the terminal as well, and faults of all.

    Args:
        rank: of this process.

    Returns:
        The log, which must still be told its file.
    """
    log = RankLog(rank)
    logging.captureWarnings(True)
    terminal = _without_rank_log(logging.getLogger("clip_train"))
    for handler in terminal:
        handler.addFilter(_worth_reading)
        if rank > 0:
            handler.setLevel(logging.CRITICAL)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        shown = _without_rank_log(logger) or (terminal if logger is logging.root else [])
        logger.handlers = shown if rank == 0 or name == "clip_train" else []
        if logger is logging.root or not logger.propagate:
            logger.addHandler(log)

    def on_thread_death(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            name = args.thread.name if args.thread else "unknown"
            log._note(f"thread {name} has died:\n{''.join(traceback.format_exception(args.exc_value))}")
        threading.__excepthook__(args)

    threading.excepthook = on_thread_death
    return log


def _worth_reading(record: logging.LogRecord) -> bool:
    """Ours, and warnings of libraries: some, such as wandb, tell the root logger all they do."""
    return record.name.startswith("clip_train") or record.levelno >= logging.WARNING


def _without_rank_log(logger: logging.Logger) -> list[logging.Handler]:
    return [handler for handler in logger.handlers if not isinstance(handler, RankLog)]  # of a run before, in tests
