"""The measured side of retrieval.py, importable by name from a fresh process."""

import time
from typing import NamedTuple

import torch
from measure import PeakMemory
from torch.nn import functional as F

from clip_train.evaluation.retrieval_ranks import retrieval_ranks


class Measured(NamedTuple):
    """Of one ranking: processor seconds, and the most memory above what the vectors take."""

    seconds: float
    peak_bytes: int


def measure_ranks(images: int, captions: int, dim: int) -> Measured:
    """Rank random unit vectors, so many captions for each image."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(images, dim, generator=generator), dim=1)
    owner = torch.arange(images).repeat_interleave(captions)
    text = torch.randn(len(owner), dim, generator=generator)
    text = F.normalize(text.add_(image[owner]), dim=1)
    pairs = torch.stack([owner, torch.arange(len(owner))], dim=1)
    small = pairs[pairs[:, 0] < 100]
    retrieval_ranks(image[:100], text[: len(small)], small)  # libraries make their buffers
    with PeakMemory() as memory:
        begin = time.process_time()
        retrieval_ranks(image, text, pairs)
        seconds = time.process_time() - begin
    return Measured(seconds, memory.bytes)
