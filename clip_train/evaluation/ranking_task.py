"""`clip-eval task=rank_captions`: candidate captions of each image in order, the best first."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from omegaconf import DictConfig

from clip_train.data.captions import CaptionSource
from clip_train.data.eval_batches import EvalBatches
from clip_train.data.files import utf8, write_atomic
from clip_train.data.labelled import set_name, shard_patterns
from clip_train.data.pairs import PairReader
from clip_train.data.picture_files import PictureFiles, find_pictures
from clip_train.distributed import agreed, gather_objects, gather_on_first, group_rank, own_part
from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.captioned_set import CaptionedImages, encode_images, encode_texts
from clip_train.evaluation.labelled_set import (
    check_same,
    data_address,
    eval_batches,
    image_key,
    shard_access,
    shard_opener,
)
from clip_train.evaluation.loaded_model import LoadedModel
from clip_train.evaluation.long_text import check_way
from clip_train.evaluation.progress import Progress
from clip_train.evaluation.ranking import RankedCaption, order_captions
from clip_train.evaluation.results import Results, writing_into
from clip_train.typed_config import typed

_SCORES = 1 << 22  # that are held at a time


@dataclass(frozen=True)
class RankingOptions:
    """Which images, and which captions.

    Attributes:
        split: which part of a set that has several.
        dataset: its name in the results; None for its folder's.
        candidates: a text file with one on each line, for all images; None for each sample's own.
        caption_key: where those are, as for `CaptionedSet`.
        top: how many are kept of each image; None for all.
        long_text, stride: what to do with captions that are longer than the context, as for `embed_texts`.

    Raises:
        ConfigError: `top` is below 1, or `caption_key` of no known form.
    """

    split: str
    dataset: str | None
    candidates: str | None
    caption_key: str
    top: int | None
    long_text: str
    stride: int | None

    def __post_init__(self) -> None:
        if self.top is not None and self.top < 1:
            raise ConfigError(f"task.top={self.top} is not at least 1")
        try:
            CaptionSource.parse(self.caption_key)
        except ConfigError as error:
            raise ConfigError(f"task.{error}") from error


class RankedImage(NamedTuple):
    """An image by its place in the set and its key, and its captions, the best first."""

    image: str
    key: str
    captions: list[RankedCaption]


def rank(loaded: LoadedModel, cfg: DictConfig) -> Results:
    """Put the candidates of each image in order. The metrics say how many there were, and how well the best ones suit.

    Written into `cfg.output`: `ranked_captions.json` and `ranked_captions.csv`.

    Raises:
        ConfigError: a value cannot be used.
        DataError: on every rank, if images or candidates cannot be read.
    """
    options = typed(RankingOptions, cfg.task, "task")
    check_way(options.long_text, options.stride, loaded.tokenizer.room, "task.")
    with agreed():
        shared = None if options.candidates is None else _read_candidates(options.candidates)
        batches = _open(options, loaded, cfg)
    check_same(batches.reader, f"data={data_address(cfg)}")
    found = encode_images(loaded, batches, distinct_texts=True)
    ranked = _ranked(loaded, batches, found, shared, options)
    best = gather_objects([image.captions[0][1:] for image in ranked])
    whole = gather_on_first(ranked)
    if group_rank() == 0:
        with writing_into(Path(str(cfg.output))) as folder:
            _write(folder, whole)
    metrics = {
        "images": len(best),
        "candidates": len(found.pairs if shared is None else shared),
        "mean_best_cosine": fmean(cosine for cosine, _ in best),
        "mean_best_probability": fmean(probability for _, probability in best),
    }
    return Results(options.dataset or set_name(data_address(cfg), options.split), "rank_captions", metrics)


def _open(options: RankingOptions, loaded: LoadedModel, cfg: DictConfig) -> EvalBatches:
    address, access = data_address(cfg), shard_access(cfg)
    patterns = shard_patterns(address, options.split, retries=access.retries, timeout=access.timeout)
    own_captions = options.candidates is None
    if patterns is None:
        if own_captions:
            raise ConfigError(f"data={address}: pictures without captions of their own; give task.candidates=FILE")
        folder = Path(address).expanduser()
        reader = PictureFiles(folder, find_pictures(str(folder), "data"))
    else:
        caption_key = options.caption_key if own_captions else None
        shards = shard_opener(access)(patterns)
        reader = PairReader(shards, image_key(cfg), caption_key, caption_setting="task.caption_key")
        if reader.num_incomplete:
            raise DataError(f"data={address}: {reader.num_incomplete} samples lack an image or a caption")
    return eval_batches(reader, loaded, cfg, with_captions=own_captions)


def _read_candidates(path: str) -> list[str]:
    """The lines of a file that are not empty, each once."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"task.candidates={path} cannot be read: {reason}") from error
    if not (candidates := list(dict.fromkeys(line.strip() for line in lines if line.strip()))):
        raise DataError(f"task.candidates={path} has no captions: one on each line")
    return candidates


def _ranked(
    loaded: LoadedModel,
    batches: EvalBatches,
    found: CaptionedImages,
    shared: Sequence[str] | None,
    options: RankingOptions,
) -> list[RankedImage]:
    """This rank's part of the images."""
    texts = found.texts if shared is None else shared
    vectors = encode_texts(loaded, texts, options.long_text, options.stride)
    own, ranked, progress = own_part(len(batches)), [], Progress(len(batches))
    with agreed():
        scale = loaded.model.logit_scale.detach().exp()
        for images, numbers in _alike(own, found, shared):
            some, captions = (vectors, texts) if numbers is None else (vectors[numbers], [texts[n] for n in numbers])
            ordered = order_captions(found.image[images.start : images.stop], some, captions, scale, options.top)
            ranked += [RankedImage(batches.name(n), batches.key(n), best) for n, best in zip(images, ordered)]
            progress.add(len(images))
        progress.end()
    return ranked


def _alike(
    own: range, found: CaptionedImages, shared: Sequence[str] | None
) -> Iterator[tuple[range, list[int] | None]]:
    """Images that have the same candidates, some at a time; and which texts these are, None for all."""
    if shared is not None:
        step = max(1, _SCORES // len(shared))
        yield from ((own[start : start + step], None) for start in range(0, len(own), step))
        return
    candidates = {image: [] for image in own}
    for image, text in found.pairs.tolist():
        if image in candidates:
            candidates[image].append(text)
    yield from ((range(image, image + 1), numbers) for image, numbers in candidates.items())


def _write(folder: Path, ranked: Sequence[RankedImage]) -> None:
    content = [
        {"image": image.image, "key": image.key, "captions": [caption._asdict() for caption in image.captions]}
        for image in ranked
    ]
    write_atomic(folder / "ranked_captions.json", utf8(json.dumps(content, indent=1, ensure_ascii=False) + "\n"))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["image", "key", "rank", *RankedCaption._fields])
    for image in ranked:
        writer.writerows([image.image, image.key, n, *caption] for n, caption in enumerate(image.captions, start=1))
    write_atomic(folder / "ranked_captions.csv", utf8(text.getvalue()))
