"""`clip-eval task=retrieval` and `task=long_text`: images find their captions, and captions their images."""

from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from clip_train.errors import ConfigError
from clip_train.evaluation.captioned_set import (
    CaptionedImages,
    CaptionedSet,
    encode_images,
    encode_texts,
    open_captioned_set,
)
from clip_train.evaluation.loaded_model import LoadedModel
from clip_train.evaluation.long_text import WAYS, check_way
from clip_train.evaluation.results import Results
from clip_train.evaluation.retrieval import captioned_metrics
from clip_train.typed_config import typed

TASK = "zeroshot_retrieval"


@dataclass(frozen=True)
class RetrievalOptions:
    """What is measured.

    Attributes:
        recall_at: the K of recall@K.
        stride: tokens from one window to the next, of `sliding_window`.
    """

    recall_at: list[int]
    stride: int | None

    def __post_init__(self) -> None:
        if not self.recall_at or min(self.recall_at) < 1:
            raise ConfigError(f"task.recall_at={self.recall_at} is not a list of numbers of at least 1")


def retrieval(loaded: LoadedModel, cfg: DictConfig) -> Results:
    """Retrieval with all captions of each image, by clip-benchmark's names and definitions.

    Raises:
        ConfigError: a value cannot be used.
        DataError: the set cannot be read.
    """
    chosen, options = typed(CaptionedSet, cfg.task, "task"), typed(RetrievalOptions, cfg.task, "task")
    way = str(cfg.task.long_text)
    check_way(way, options.stride, loaded.tokenizer.room, "task.")
    name, batches = open_captioned_set(chosen, loaded, cfg)
    found = encode_images(loaded, batches, chosen.distinct_texts)
    return Results(name, TASK, _metrics(loaded, found, way, options))


def long_text(loaded: LoadedModel, cfg: DictConfig) -> Results:
    """The same with every way to embed texts that are longer than the context; a variant each.

    The metrics of the set itself are those of `truncate`, with the number of texts and the share that is too long.

    Raises:
        ConfigError: a value cannot be used.
        DataError: the set cannot be read.
    """
    chosen, options = typed(CaptionedSet, cfg.task, "task"), typed(RetrievalOptions, cfg.task, "task")
    check_way("truncate", options.stride, loaded.tokenizer.room, "task.")
    name, batches = open_captioned_set(chosen, loaded, cfg)
    found = encode_images(loaded, batches, chosen.distinct_texts)
    variants = {way: _metrics(loaded, found, way, options) for way in WAYS}
    lengths = torch.tensor([len(ids) for ids in loaded.tokenizer.whole_ids(found.texts)])
    too_long = (lengths > loaded.tokenizer.room).double().mean().item()
    about = {"texts": len(found.texts), "median_tokens": int(lengths.median()), "longer_than_context": too_long}
    return Results(name, TASK, {**variants["truncate"], **about}, variants)


def _metrics(loaded: LoadedModel, found: CaptionedImages, way: str, options: RetrievalOptions) -> dict[str, float]:
    text = encode_texts(loaded, found.texts, way, options.stride)
    return captioned_metrics(found.image, text, found.pairs, options.recall_at)
