"""What is in a set of shards: counts, sizes, lengths of captions, duplicates."""

import glob
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from clip_train.data.captions import UnusableCaption
from clip_train.data.decoding import FORMATS
from clip_train.data.index import ABSENT, ShardIndex
from clip_train.data.remote import scheme_of
from clip_train.data.tokenizer import END_ID, ClipTokenizer
from clip_train.errors import DataError
from clip_train.shard_tools.access import ShardAccess
from clip_train.shard_tools.damage import Damage
from clip_train.shard_tools.indexing import index_shards
from clip_train.shard_tools.parallel import Progress, run_parallel
from clip_train.shard_tools.samples import SampleTask, Selection, sample_tasks

CONTEXT_LENGTH = 77  # CLIP's
_LONGEST_COUNTED = 1024  # tokens; longer captions count as this long
_CAPTIONS_AT_ONCE = 1000
_MOST_COMMON = 10


class Measured(NamedTuple):
    """One sample. Sizes in bytes and pixels; 0 for what could not be read."""

    image_bytes: int
    width: int
    height: int
    extension: str
    captions: list[str]


@dataclass
class Measurements:
    """The samples that were looked at, and what there is in all."""

    indexes: list[ShardIndex]
    access: ShardAccess
    samples: list[Measured] = field(default_factory=list)

    def captions(self) -> list[str]:
        """Of all samples that were looked at; one sample may have several."""
        return [caption for sample in self.samples for caption in sample.captions]

    def pictures(self) -> list[Measured]:
        """The samples whose picture could be read."""
        return [sample for sample in self.samples if sample.width]


def measure_shards(
    shards: Sequence[str],
    selection: Selection,
    access: ShardAccess,
    num_workers: int,
    on_progress: Progress = lambda *_: None,
) -> Measurements:
    """Measure the selected samples.

    Raises:
        DataError: a shard is damaged, or none has any file under one of the keys.
    """
    indexes = {}
    with closing(index_shards(shards, access, num_workers)) as results:
        for result in results:
            if isinstance(result, Damage):
                raise DataError(f"{result.detail} (clip-shards verify lists all damage)")
            indexes[result.shard] = result
            on_progress("reading headers", len(indexes), len(shards))
    measured = Measurements([indexes[shard] for shard in shards], access)
    tasks = sample_tasks(measured.indexes, selection, access)
    total = sum(len(task.rows) for task in tasks)
    with closing(run_parallel(_measure, tasks, num_workers)) as results:
        for samples in results:
            measured.samples += samples
            on_progress("measuring samples", len(measured.samples), total)
    return measured


def summarize(measured: Measurements) -> dict[str, Any]:
    """Everything as plain numbers, for stats.json. Shards and bytes are of all samples, the rest of those measured."""
    pictures, captions = measured.pictures(), measured.captions()
    tokens, counts = count_tokens(captions), Counter(captions)
    repeated = sum(count for count in counts.values() if count > 1)
    sizes = [index.num_samples for index in measured.indexes]
    return {
        "num_shards": len(sizes),
        "num_samples": sum(sizes),
        "samples_per_shard": distribution(sizes),
        "shard_bytes": sum(index.num_bytes for index in measured.indexes),
        "bytes_by_extension": _bytes_by_extension(measured.indexes),
        "download": _download(index.shard for index in measured.indexes),
        "num_measured": len(measured.samples),
        "num_without_image": len(measured.samples) - len(pictures),
        "num_without_caption": sum(not sample.captions for sample in measured.samples),
        "image_extensions": dict(Counter(sample.extension for sample in pictures).most_common()),
        "image_bytes": distribution([sample.image_bytes for sample in pictures]),
        "image_width": distribution([sample.width for sample in pictures]),
        "image_height": distribution([sample.height for sample in pictures]),
        "aspect_ratio": distribution([sample.width / sample.height for sample in pictures]),
        "num_captions": len(captions),
        "caption_words": distribution([len(caption.split()) for caption in captions]),
        "caption_tokens": distribution(tokens),
        "context_length": CONTEXT_LENGTH,
        "over_context_length_fraction": float((tokens > CONTEXT_LENGTH).mean()) if len(tokens) else 0.0,
        "duplicate_caption_fraction": repeated / len(captions) if captions else 0.0,
        "most_common_captions": {text: n for text, n in counts.most_common(_MOST_COMMON) if n > 1},
    }


def distribution(values: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    """Mean, extremes and percentiles; None of nothing."""
    if len(values) == 0:
        return None
    low, p5, median, p95, high = np.percentile(values, [0, 5, 50, 95, 100]).tolist()
    return {"mean": float(np.mean(values)), "min": low, "p5": p5, "median": median, "p95": p95, "max": high}


def count_tokens(captions: Sequence[str]) -> np.ndarray:
    """CLIP tokens of each caption, the start and end tokens among them."""
    tokenizer = ClipTokenizer(_LONGEST_COUNTED)
    batches = [captions[i : i + _CAPTIONS_AT_ONCE] for i in range(0, len(captions), _CAPTIONS_AT_ONCE)]
    return np.concatenate([np.zeros(0, int), *((tokenizer(batch) == END_ID).argmax(axis=1) + 1 for batch in batches)])


def _measure(task: SampleTask) -> list[Measured]:
    keys = task.selection.captions.keys
    measured = []
    for sample in task.read():
        captions: list[str] = []
        for key in keys:
            try:
                captions += key.read(sample.captions.get(key.extension, b""))
            except UnusableCaption:
                continue
        width, height = _image_size(sample.image or b"")
        measured.append(Measured(len(sample.image or b""), width, height, sample.image_extension, captions))
    return measured


def _image_size(encoded: bytes) -> tuple[int, int]:
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS).size  # reads the header only
    except Exception:  # a damaged file raises what its decoder happens to stumble over
        return 0, 0


def _bytes_by_extension(indexes: Iterable[ShardIndex]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for index in indexes:
        extents = index.read_extents()
        sizes = np.where(extents[:, :, 0] == ABSENT, 0, extents[:, :, 1]).sum(axis=0).tolist()
        totals.update(dict(zip(index.extensions, sizes)))
    return dict(totals.most_common())


def _download(shards: Iterable[str]) -> dict[str, Any] | None:
    """The sum of what img2dataset noted beside the local shards (NNNNN_stats.json), if it did."""
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for folder in {os.path.dirname(shard) for shard in shards if not scheme_of(shard)}:
        for path in glob.glob(os.path.join(glob.escape(folder), "*_stats.json")):
            try:
                with open(path, "rb") as file:
                    noted = json.load(file)
                totals.update({name: int(noted[name]) for name in ("count", "successes")})
                reasons.update({str(name): int(count) for name, count in noted["status_dict"].items()})
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # another program's file of that name
    return {**totals, "status": dict(reasons.most_common(_MOST_COMMON))} if totals["count"] else None
