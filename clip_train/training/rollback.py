"""A run goes back to an earlier state, and leaves out data from there on; also if it is killed on the way."""

import json
from pathlib import Path

from clip_train.data.files import write_atomic


class RollBack(Exception):
    """Every rank leaves the same step by it, for the run to be taken up from an earlier state with other data.

    Attributes:
        checkpoint: of that state; None is the start of the run.
        skipped_samples: how far the run is from then on ahead of `samples_seen` in the sample stream.
        count: roll-backs of the run so far, this one included.
    """

    def __init__(self, checkpoint: Path | None, skipped_samples: int, count: int) -> None:
        super().__init__(f"back to {checkpoint.name if checkpoint else 'the start'}")
        self.checkpoint, self.skipped_samples, self.count = checkpoint, skipped_samples, count


def note_rollback(path: Path, rollback: RollBack) -> None:
    """Keep a roll-back in a file, until a checkpoint knows of it."""
    name = rollback.checkpoint.name if rollback.checkpoint else None
    noted = {"checkpoint": name, "skipped_samples": rollback.skipped_samples, "count": rollback.count}
    write_atomic(path, json.dumps(noted).encode())


def noted_rollback(path: Path, checkpoint: Path | None) -> RollBack | None:
    """The roll-back in the file, if it led to this checkpoint, or to the start of the run if there is none."""
    if not path.exists():
        return None
    noted = json.loads(path.read_text())
    if noted["checkpoint"] != (checkpoint.name if checkpoint else None):
        return None  # the run has come further since
    return RollBack(checkpoint, noted["skipped_samples"], noted["count"])
