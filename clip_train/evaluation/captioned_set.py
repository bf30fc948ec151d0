"""A set of images with one or many captions each: what a task of `clip-eval` names, and its embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from omegaconf import DictConfig
from torch import Tensor

from clip_train.data.captions import CaptionSource
from clip_train.data.eval_batches import EvalBatches, rank_slices
from clip_train.data.labelled import set_name, shard_patterns
from clip_train.data.loader import make_loader
from clip_train.data.pairs import PairReader
from clip_train.distributed import agreed, gather_objects, gather_parts, group_rank, group_size, own_part
from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.labelled_set import (
    check_same,
    data_address,
    eval_batches,
    image_key,
    shard_access,
    shard_opener,
)
from clip_train.evaluation.loaded_model import LoadedModel, check_numbers
from clip_train.evaluation.long_text import embed_texts
from clip_train.evaluation.progress import told


@dataclass(frozen=True)
class CaptionedSet:
    """Which set, and where its captions are.

    Attributes:
        split: which part of a set that has several.
        dataset: its name in the results; None for its folder's.
        caption_key: `txt`, of which each line is a caption, or `json:path`, a text or a list of them.
        distinct_texts: captions that are the same, word by word, are one text, which belongs to all their images.

    Raises:
        ConfigError: `caption_key` is of neither form.
    """

    split: str
    dataset: str | None
    caption_key: str
    distinct_texts: bool

    def __post_init__(self) -> None:
        try:
            CaptionSource.parse(self.caption_key)
        except ConfigError as error:
            raise ConfigError(f"task.{error}") from error


class CaptionedImages(NamedTuple):
    """All images of a set, on every rank, and what was said of them.

    Attributes:
        image: unit vectors.
        texts: all captions, in the order of the images that have them.
        pairs: which image (first column) has which text (second column).
    """

    image: Float[Tensor, "images embed"]
    texts: list[str]
    pairs: Int64[Tensor, "pairs 2"]


def open_captioned_set(chosen: CaptionedSet, loaded: LoadedModel, cfg: DictConfig) -> tuple[str, EvalBatches]:
    """A set's name, and its batches with all captions.

    Raises:
        ConfigError: a value cannot be used.
        DataError: on every rank, if one cannot read the set or sees another, or samples lack an image or a caption.
    """
    address, access = data_address(cfg), shard_access(cfg)
    with agreed():
        patterns = shard_patterns(address, chosen.split, retries=access.retries, timeout=access.timeout)
        if patterns is None:
            raise DataError(f"data={address}: there are no shards (*.tar) in this folder")
        shards = shard_opener(access)(patterns)
        reader = PairReader(shards, image_key(cfg), chosen.caption_key, caption_setting="task.caption_key")
        if reader.num_incomplete:
            raise DataError(f"data={address}: {reader.num_incomplete} samples lack an image or a caption")
    check_same(reader, f"data={address}")
    return chosen.dataset or set_name(address, chosen.split), eval_batches(reader, loaded, cfg, with_captions=True)


@torch.no_grad()
def encode_images(loaded: LoadedModel, batches: EvalBatches, distinct_texts: bool = False) -> CaptionedImages:
    """Embed the images of a set, each rank its share, and collect their captions.

    Args:
        batches: with captions.
        distinct_texts: see `CaptionedSet`.

    Raises:
        DataError: on every rank, if a sample cannot be used.
    """
    vectors = [torch.empty(0, loaded.model.embed_dim, device=loaded.device)]
    own: list[list[str]] = []
    slices = rank_slices(len(batches), group_rank(), group_size(), loaded.batch_size)
    with agreed(loaded.batch_size), loaded.autocast():
        for batch in told(make_loader(batches, slices, loaded.num_workers), len(batches)):
            if batch["error"]:
                raise DataError(batch["error"])
            if len(batch["image"]):
                vectors.append(loaded.model.encode_image(batch["image"].to(loaded.device)))
                own += batch.get("captions", [])
    captions = gather_objects(own)
    image = gather_parts(torch.cat(vectors), len(batches))
    check_numbers(image)
    texts, pairs = _number(captions, distinct_texts)
    return CaptionedImages(image, texts, pairs.to(loaded.device))


def encode_texts(
    loaded: LoadedModel, texts: Sequence[str], way: str = "truncate", stride: int | None = None
) -> Float[Tensor, "texts embed"]:
    """Unit vectors of texts, on every rank; each encodes its share.

    Args:
        way, stride: what to do with texts that are longer than the context, as for `embed_texts`.

    Raises:
        ConfigError: as `embed_texts`.
    """
    distinct = list(dict.fromkeys(texts))  # each once: in another batch its vector might differ in the last bits
    part = own_part(len(distinct))
    own = distinct[part.start : part.stop]
    with agreed(loaded.batch_size), loaded.autocast():
        vectors = embed_texts(
            own,
            loaded.model.encode_text,
            loaded.tokenizer,
            way=way,
            stride=stride,
            batch_size=loaded.batch_size,
            device=loaded.device,
        )
    found = gather_parts(vectors.view(len(own), loaded.model.embed_dim), len(distinct))
    check_numbers(found)
    place = {text: number for number, text in enumerate(distinct)}
    return found if len(distinct) == len(texts) else found[[place[text] for text in texts]]


def _number(captions: Sequence[Sequence[str]], distinct: bool) -> tuple[list[str], Int64[Tensor, "pairs 2"]]:
    """The texts, and which image has which of them."""
    owned = [(image, text) for image, own in enumerate(captions) for text in own]
    if not distinct:
        return [text for _, text in owned], torch.tensor([[image, place] for place, (image, _) in enumerate(owned)])
    numbers: dict[str, int] = {}
    pairs = dict.fromkeys((image, numbers.setdefault(text, len(numbers))) for image, text in owned)
    return list(numbers), torch.tensor(list(pairs))
