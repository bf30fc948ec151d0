"""Small labelled shards: pictures of one colour and noise, whose class is the colour."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import write_shard

CLASSES = ("red", "green", "blue", "yellow", "pink", "white", "black")
TEMPLATES = ("a photo of a {}.", "a {} thing", "{}")
_COLORS = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (220, 120, 180), (230, 230, 230), (20, 20, 20)]


def make_labelled(
    folder: Path,
    counts: Sequence[int],
    change: Callable[[dict], dict] = lambda sample: sample,
    first: int = 0,
    num_classes: int = len(CLASSES),
) -> str:
    """Write shards of so many samples and their classes.json; returns the pattern that names the shards.

    Args:
        change: applied to each sample.
        first: number of the first sample; it decides the noise, and the label is it modulo the classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = first
    for shard, count in enumerate(counts):
        samples = [change(_sample(number + i, num_classes)) for i in range(count)]
        write_shard(folder / f"{shard:05d}.tar", samples)
        number += count
    classes = {"classnames": CLASSES[:num_classes], "templates": TEMPLATES}
    (folder / "classes.json").write_text(json.dumps(classes))
    return f"{folder}/*.tar"


def _sample(number: int, num_classes: int) -> dict:
    label = number % num_classes
    noise = np.random.default_rng(number).normal(0, 25, (32, 32, 3))
    pixels = np.clip(np.array(_COLORS[label]) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"__key__": f"{number:06d}", "png": buffer.getvalue(), "cls": str(label), "txt": CLASSES[label]}
