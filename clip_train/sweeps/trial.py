"""One trial of a sweep: a run whose folder says so, and who is at work on it."""

import csv
import fcntl
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from clip_train.data.files import write_atomic
from clip_train.training.signals import stop_requested

WAITING, RUNNING, COMPLETE, PRUNED = "waiting", "running", "complete", "pruned"
DIVERGED, FAILED, INTERRUPTED = "diverged", "failed", "interrupted"


@dataclass
class Trial:
    """A run of a sweep.

    Attributes:
        number: in the sweep, from 0.
        overrides: what it has of its own, as on the command line.
        folder: of the run.
        state: one of the words above.
        value: of the sweep's objective, if the trial is complete.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path
    state: str = WAITING
    value: float | None = None


class TrialFile:
    """`trial.json` in a run's folder: written by the sweep, read by the run, and locked as long as the run lasts."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / "trial.json"
        self._lock: IO | None = None

    def write(self, trial: Trial, study: Mapping[str, Any] | None) -> None:
        """Say what the run belongs to; `study` is what it needs to report there."""
        if not self.path.exists():  # a lock is on the file itself, so the file stays
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = {"number": trial.number, "overrides": trial.overrides, "study": study}
            write_atomic(self.path, (json.dumps(content, indent=2) + "\n").encode())

    def read(self) -> dict[str, Any] | None:
        """The content, None if the run is no trial."""
        return json.loads(self.path.read_text()) if self.path.exists() else None

    def lock(self) -> bool:
        """Whether this process, and no other, is now the one at work on the run."""
        file = open(self.path, "r+")  # noqa: SIM115 - kept; NFS grants no exclusive lock on a file opened for reading
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        self._lock = file
        return True

    def unlock(self) -> None:
        """Let others work on the run."""
        if self._lock:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing is not enough: a forked loader worker has it open, too
            self._lock.close()
            self._lock = None

    def wait_until_free(self) -> bool:
        """Wait for a process that is at work on the run, as one may be left of a sweep that was killed.

        Returns:
            False if a signal to stop came first.
        """
        while not self.lock():
            if stop_requested():
                return False
            time.sleep(0.5)
        self.unlock()
        return True


def read_summary(run_folder: Path) -> dict[str, Any]:
    """A run's summary.json; empty if it has none."""
    path = run_folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read_samples_seen(run_folder: Path) -> int | None:
    """How far a run has come by its metrics.csv, which one that failed has too."""
    path = run_folder / "metrics.csv"
    if not path.exists():
        return None
    with open(path, newline="") as file:
        rows = [row["samples_seen"] for row in csv.DictReader(file) if row.get("samples_seen")]
    return int(rows[-1]) if rows else None
