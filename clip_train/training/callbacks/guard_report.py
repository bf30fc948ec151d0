"""What a run that has diverged leaves behind, for whoever has to find out why."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_train.data.batches import TrainBatches
from clip_train.data.files import write_atomic
from clip_train.errors import DataError
from clip_train.training.callbacks.guard import StepRecord


def write_report(
    path: Path, steps: Sequence[StepRecord], skipped_samples: int, batches: TrainBatches, config: Mapping[str, Any]
) -> Path:
    """Write the last steps, the samples of the bad ones by shard and key, and the config.

    Args:
        path: a .json file, replaced if it exists.
        steps: the last ones of the run.
        skipped_samples: how far the stream is ahead of `samples_seen`.
        batches: says which samples a step had.
        config: of the run.

    Returns:
        The path.
    """
    bad = []
    for record in steps:
        if record.is_bad:
            position = record.samples_seen + skipped_samples - batches.batch_size
            samples = samples_of_batch(batches, position)
            bad.append({"step": record.step, "samples_seen": record.samples_seen, "position": position, **samples})
    content = {
        "bad_steps": bad,
        "last_steps": [
            {"step": record.step, "samples_seen": record.samples_seen, **_plain(record.metrics)} for record in steps
        ],
        "config": config,
    }
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def samples_of_batch(batches: TrainBatches, position: int) -> dict[str, dict[str, list[str]]]:
    """Of the global batch that begins at a position: `samples`, the keys in each shard.

    Those of a shard that cannot be read any more are numbers.
    """
    positions = np.arange(position, position + batches.batch_size, dtype=np.int64)
    keys: dict[str, list[str]] = {}
    for shard, sample in zip(*(numbers.tolist() for numbers in batches.order.locate(positions))):
        try:
            key = batches.reader.key(shard, sample)
        except DataError:
            key = f"[{sample}]"
        keys.setdefault(batches.reader.shard_names[shard], []).append(key)
    return {"samples": keys}


def _plain(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no word for what is not finite."""
    return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
