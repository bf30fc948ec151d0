"""Trains as `train_many` does, and leaves in each run's folder the bytes that a rank has sent in its third step."""

import json
import sys
from pathlib import Path

from clip_train.training.module import ClipModule
from scripts.bench.measure import WireBytes
from tests.distributed import train_many

STEPS = 4  # by the third one DDP's buckets are what they stay


def main(output_dir: str, *runs: str) -> None:
    step = ClipModule.training_step
    for run in runs:
        wire = WireBytes()
        ClipModule.training_step = _counted(step, wire)
        train_many.main(output_dir, run)
        Path(output_dir, run.split()[0], "sent.json").write_text(json.dumps(wire.sent))


def _counted(training_step, wire: WireBytes):
    """A step that counts from the beginning of the third one to that of the fourth: what lies between them, too."""
    steps = 0

    def counted(self, batch, batch_idx):
        nonlocal steps
        steps += 1
        if steps == STEPS - 1:
            wire.__enter__()
        if steps == STEPS:
            wire.__exit__(None, None, None)
        training_step(self, batch, batch_idx)

    return counted


if __name__ == "__main__":
    main(*sys.argv[1:])
