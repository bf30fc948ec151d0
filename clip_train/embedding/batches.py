"""Batches of samples that are embedded; what cannot be used is left out and told of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clip_train.data.batches import UNUSABLE, pixel_buffer
from clip_train.data.captions import UnusableCaption
from clip_train.data.pairs import UnusableSample
from clip_train.data.preprocessing import preprocess
from clip_train.data.tokenizer_choice import CaptionTokenizer
from clip_train.embedding.options import IMAGE, TEXT, EmbedOptions
from clip_train.embedding.sources import Sample, Task
from clip_train.errors import DataError
from clip_train.shard_tools.damage import Damage

Row = dict[str, Any]  # of the metadata


class PartBatch(NamedTuple):
    """The usable ones of some samples.

    Attributes:
        image: uint8 (b, 3, size, size); empty if pictures are not asked for.
        text: token ids (b, context); empty if texts are not asked for.
        rows: of the metadata, one for each.
        bad: the samples left out.
        error: why nothing could be read; it travels as data, out of a loader's worker.
    """

    image: Tensor
    text: Tensor
    rows: list[Row]
    bad: list[Damage]
    error: str = ""


@dataclass(frozen=True)
class PartBatches(Dataset[PartBatch]):
    """`batches[task]` reads, decodes and tokenizes the samples of a task, as evaluation does.

    Attributes:
        image_size, resize_mode, interpolation: of the model.
    """

    options: EmbedOptions
    tokenizer: CaptionTokenizer
    image_size: int
    resize_mode: str
    interpolation: str

    def __getitem__(self, task: Task) -> PartBatch:
        sides = self.options.sides
        pixels = pixel_buffer(len(task) if IMAGE in sides else 0, self.image_size)
        rows, bad, out = [], [], pixels.numpy()
        try:
            for sample in task.read():
                try:
                    if IMAGE in sides:
                        out[len(rows)] = self._picture(sample)
                    rows.append(_row(sample, self._caption(sample), self.options.metadata))
                except UNUSABLE as error:
                    place = sample.shard or sample.image_path
                    bad.append(Damage(error.kind, place, sample.key, str(error)))
        except DataError as error:
            return PartBatch(torch.empty(0), torch.empty(0), [], [], str(error))
        except OSError as error:
            return PartBatch(torch.empty(0), torch.empty(0), [], [], f"{error.filename}: {error.strerror or error}")
        ids = torch.from_numpy(self.tokenizer([row["caption"] for row in rows])) if TEXT in sides else torch.empty(0)
        return PartBatch(pixels[: len(rows)].permute(0, 3, 1, 2), ids, rows, bad)

    def _picture(self, sample: Sample) -> np.ndarray:
        if sample.image is None:
            raise UnusableSample(f"no {' or '.join(self.options.image_key.split(';'))} file")
        return preprocess(sample.image, self.image_size, self.resize_mode, self.interpolation)

    def _caption(self, sample: Sample) -> str | None:
        """Raises UnusableCaption if there is none, where texts are asked for."""
        try:
            return self.options.captions.first(sample.files)
        except UnusableCaption:
            if TEXT in self.options.sides:
                raise
            return None


def _row(sample: Sample, caption: str | None, fields: Sequence[str]) -> Row:
    size = len(sample.image) if sample.image is not None else 0
    row = {
        "key": sample.key,
        "image_path": sample.image_path,
        "caption": caption,
        "shard": sample.shard,
        "offset": sample.offset,
        "size": size,
    }
    if fields:
        found = _json(sample.files.get("json", b"{}"))
        row |= {name: found.get(name) for name in fields}
    return row


def _json(content: bytes) -> dict[str, Any]:
    """A sample's JSON; nothing if it is none, as a missing field is no reason to leave a sample out."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
