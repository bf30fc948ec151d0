"""Batches as pure functions of where they start, so that workers, resuming and world size cannot change them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from clip_train.data.augmentation import Augmentation
from clip_train.data.captions import UnusableCaption, drop_words
from clip_train.data.decoding import MAX_IMAGE_PIXELS, EncodedImage, Pixels, UnusableImage
from clip_train.data.keyed_random import AUGMENTATION, CAPTION_CHOICE, LONG_CAPTION, WORD_DROPOUT, keyed_uniforms
from clip_train.data.loader_stages import StageClock
from clip_train.data.mixture import Mixture
from clip_train.data.order import SampleOrder
from clip_train.data.pairs import PairReader, UnusableSample
from clip_train.data.staging import Stager
from clip_train.data.tokenizer_choice import CaptionTokenizer
from clip_train.errors import DataError, UnreachableError

MAX_CONSECUTIVE_BAD = 100
UNUSABLE = (UnusableImage, UnusableCaption, UnusableSample)


class BadSample(NamedTuple):
    """A sample that could not be used.

    Attributes:
        kind: `image_unreadable`, `image_too_large`, `caption_empty`, `caption_not_utf8`, `caption_missing`,
            `label_missing`, `label_not_a_number`, `label_out_of_range` or `file_missing`.
        shard: path or address.
        key: of the sample in its shard.
        reason: for people.
    """

    kind: str
    shard: str
    key: str
    reason: str


class Batch(TypedDict):
    """A rank's part of one global batch.

    `bad` tells of the samples that could not be used and were replaced; `error`, if not empty, says why none could
    be, and `passing` whether that may pass. It travels as data, because an exception in a loader's worker reaches one
    rank only and would leave the others waiting. `label`, if the model asks for it, is the samples' classes;
    `captions`, if evaluation does, all of each sample's captions; `features`, in place of pictures, is what its tower
    made of them before. `names` are the samples' shards and numbers, if they were asked for; `seconds` is what each
    stage of loading took; `retries` is how often the process that made it had to go on with a download since its last
    batch.
    """

    image: UInt8[Tensor, "b 3 height width"]
    text: Int64[Tensor, "b context"]
    label: NotRequired[Int64[Tensor, " b"]]
    captions: NotRequired[list[list[str]]]
    features: NotRequired[Float[Tensor, "b width"]]
    bad: list[BadSample]
    error: str
    passing: NotRequired[bool]
    names: list[str]
    seconds: dict[str, float]
    retries: int


@dataclass(frozen=True)
class TrainBatches(Dataset[Batch]):
    """The local batch that begins at a position of the stream, for one rank.

    Attributes:
        decode: `fast` decodes a JPEG no larger than its crop needs; `exact` in full, as Pillow does.
        max_image_pixels: larger images are bad samples.
        word_dropout: share of a caption's words that are left out.
        with_names: whether batches tell their samples' names.
        with_labels: whether batches tell their samples' classes; a sample without one is a bad sample.
        stager: asked how often it had to go on with a download; None for local shards.
    """

    reader: PairReader
    order: SampleOrder | Mixture
    augmentation: Augmentation
    tokenizer: CaptionTokenizer
    image_size: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    decode: str = "fast"
    max_image_pixels: int = MAX_IMAGE_PIXELS
    word_dropout: float = 0.0
    with_names: bool = False
    with_labels: bool = False
    stager: Stager | None = None

    def __getitem__(self, start: int) -> Batch:
        """The part of this rank of the global batch `[start, start + batch_size)`."""
        batch = self._make(start)
        batch["retries"] = self.stager.take_retries() if self.stager else 0
        return batch

    def _make(self, start: int) -> Batch:
        clock, bad = StageClock(), []
        positions = self.order.rank_positions(start, self.batch_size, self.rank, self.world_size)
        shards, samples = (numbers.tolist() for numbers in self.order.locate(positions))
        image = pixel_buffer(len(positions), self.image_size)
        clock.lap("collate")
        try:
            self.reader.will_need(zip(shards, samples))
            clock.lap("read")
            texts = self._fill(image.numpy(), positions, zip(shards, samples), bad, clock)
            used = zip(shards, [text.number for text in texts])
            names = [self.reader.name(*sample) for sample in used] if self.with_names else []
        except DataError as error:
            return failed(str(error), bad, passing=isinstance(error, UnreachableError))
        ids = self._tokens([text.caption for text in texts], positions)
        clock.lap("tokenize")
        labels = [text.label for text in texts] if self.with_labels else None
        return assemble(image, ids, bad, names, clock.seconds, labels)

    def _fill(
        self,
        pixels: UInt8[np.ndarray, "b height width 3"],
        positions: np.ndarray,
        samples: Iterable[tuple[int, int]],
        bad: list[BadSample],
        clock: StageClock,
    ) -> list["_Text"]:
        """Make the pictures; returns what else the samples say that were used."""
        draws = keyed_uniforms(AUGMENTATION, self.order.seed, positions, count=self.augmentation.num_draws).tolist()
        choices = keyed_uniforms(CAPTION_CHOICE, self.order.seed, positions, count=1)[:, 0].tolist()
        texts = []
        for (shard, sample), out, draw, choice in zip(samples, pixels, draws, choices):
            clock.lap("collate")
            crop, text = self._usable(shard, sample, draw, choice, bad, clock)
            self.augmentation.finish(crop, draw, out)
            clock.lap("augment")
            texts.append(text)
        return texts

    def _usable(
        self, shard: int, sample: int, draws: list[float], choice: float, bad: list[BadSample], clock: StageClock
    ) -> tuple[Pixels, "_Text"]:
        """Crop and text of the sample, or of the next usable one in its shard; then it goes to `bad`."""
        count = self.reader.counts[shard]
        reason: Exception | None = None
        first = sample
        for step in range(min(count, MAX_CONSECUTIVE_BAD)):
            number = (first + step) % count
            try:
                pair = self.reader.read(shard, number)
                text = _Text(pair.caption(choice), pair.label() if self.with_labels else -1, number)
                clock.lap("read")
                image = EncodedImage(pair.image, self.max_image_pixels)
                crop = self.augmentation.crop(image, self.image_size, draws, fast=self.decode == "fast")
                clock.lap("decode")
                return crop, text
            except UNUSABLE as error:
                reason = error
                if step == 0:
                    name, key = self.reader.shard_names[shard], self.reader.key(shard, sample)
                    bad.append(BadSample(error.kind, name, key, str(error)))
                if isinstance(error, UnusableSample):
                    first = -step - 1  # the shard is shorter than it was said to be: go on from its beginning
        name, tried = self.reader.name(shard, sample), min(count, MAX_CONSECUTIVE_BAD)
        raise DataError(f"{tried} unusable samples in a row, from {name} on ({reason})")

    def _tokens(self, captions: list[str], positions: np.ndarray) -> Int64[np.ndarray, "b context"]:
        seed = self.order.seed
        if self.word_dropout:
            draws = keyed_uniforms(WORD_DROPOUT, seed, positions, count=1)[:, 0].tolist()
            captions = [drop_words(caption, self.word_dropout, draw) for caption, draw in zip(captions, draws)]
        return self.tokenizer(captions, keyed_uniforms(LONG_CAPTION, seed, positions, count=1)[:, 0])


class _Text(NamedTuple):
    """Of a sample, its caption, its class, and its number in the shard."""

    caption: str
    label: int
    number: int


def pixel_buffer(count: int, size: int) -> UInt8[Tensor, "count size size 3"]:
    """Room for pictures; in a loader's worker in shared memory, so that they need not be copied to be sent."""
    shape = (count, size, size, 3)
    if count == 0 or get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))  # numpy asks for huge pages, torch does not
    storage = torch.UntypedStorage(0)._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # pyright: ignore[reportCallIssue, reportArgumentType]


def assemble(
    pixels: UInt8[Tensor, "b height width 3"],
    ids: Int64[np.ndarray, "b context"],
    bad: Sequence[BadSample] = (),
    names: Sequence[str] = (),
    seconds: Mapping[str, float] | None = None,
    labels: Sequence[int] | None = None,
) -> Batch:
    """A batch of what is usable. The pictures become a view: channels last, as the files have them."""
    image, text = pixels.permute(0, 3, 1, 2), torch.from_numpy(ids)
    names, seconds = list(names), dict(seconds or {})
    batch = Batch(image=image, text=text, bad=list(bad), error="", names=names, seconds=seconds, retries=0)
    if labels is not None:
        batch["label"] = torch.tensor(labels, dtype=torch.int64)
    return batch


def failed(error: str, bad: Sequence[BadSample] = (), passing: bool = False) -> Batch:
    """What is sent instead of a batch that cannot be made; `passing` if it may be made later."""
    nothing = torch.empty(0)
    return Batch(
        image=nothing, text=nothing, bad=list(bad), error=error, passing=passing, names=[], seconds={}, retries=0
    )
