"""Small shards and models for all tests."""

import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.writer import TarWriter

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums of several threads differ in the last bit from those of one
torch.set_num_threads(1)  # a plugin of pytest has imported it before
with suppress(ImportError):  # a machine that is lent for its GPU may be without
    from hypothesis import settings

    settings.register_profile("no_deadline", deadline=None)  # tests assert behaviour, never time
    settings.load_profile("no_deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those on the test cluster first: they are in one file, and wait more than they compute."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


COLORS = ["red", "green", "blue", "yellow", "pink", "white", "black", "orange"]


def encode_image(seed: int, size: tuple[int, int] = (20, 16), format: str = "PNG") -> bytes:
    """A picture of noise, different for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def make_sample(number: int) -> dict:
    caption = f"a {COLORS[number % 8]} thing number {number}"
    return {
        "__key__": f"{number:06d}",
        "png": encode_image(number),
        "txt": caption,
        "json": {"captions": [caption, f"thing {number}"], "nested": {"title": caption.upper()}},
    }


def write_shard(path: Path, samples: Sequence[dict]) -> str:
    """Write a tar as webdataset does."""
    with TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write({k: json.dumps(v).encode() if isinstance(v, dict) else v for k, v in sample.items()})
    return str(path)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A program that runs in this process decides where the package logs to; the next test shall not find that."""
    logger = logging.getLogger("clip_train")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture
def nothing_is_compiled() -> Iterator[None]:
    """What torch.compile would take long for runs as it is written."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., list[str]]:
    """`make_shards([10, 7])` writes shards of 10 and 7 samples."""

    def make(counts: Sequence[int], change: Callable[[dict], dict] = lambda sample: sample) -> list[str]:
        folder = tmp_path / "shards"
        folder.mkdir(exist_ok=True)
        shards, number = [], 0
        for shard, count in enumerate(counts):
            samples = [change(make_sample(number + i)) for i in range(count)]
            shards.append(write_shard(folder / f"{shard:05d}.tar", samples))
            number += count
        return shards

    return make
