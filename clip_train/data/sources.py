"""Several sources in one training set: `A::B`, each with keys of its own, mixed by weight or simply joined."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TypeVar

from clip_train.data.class_names import LABEL_EXTENSION, ClassNames
from clip_train.data.index import ShardIndex
from clip_train.data.mixture import Mixture
from clip_train.data.order import SampleOrder
from clip_train.data.pairs import PairReader, RemoteShard
from clip_train.errors import ConfigError, DataError

CaptionKeys = str | Mapping[str, float]
OpenShards = Callable[[str], Sequence[ShardIndex | RemoteShard]]
FindClasses = Callable[[str | None, str], ClassNames]
Value = TypeVar("Value")


def open_sources(
    shards: str | Sequence[str],
    image_key: str | Sequence[str],
    caption_key: CaptionKeys | Sequence[CaptionKeys],
    open_shards: OpenShards,
    setting: str,
    classes: str | Sequence[str | None] | None = None,
    find_classes: FindClasses | None = None,
) -> dict[str, PairReader]:
    """A reader for each source, by name.

    Args:
        shards: patterns, `::` between sources, or a list of them.
        image_key, caption_key: one for all sources, or a list with one for each.
        open_shards: from a pattern to its shards.
        setting: where the keys are in the config, for errors.
        classes: where the class names are, for sources with the caption key `cls`; None is beside their shards.
        find_classes: from that and the first shard to the class names; None is for sets without labels.

    Raises:
        ConfigError: a list that is not as long as there are sources.
        DataError: a source's shards cannot be read.
    """
    patterns = split_sources(shards)
    images = _for_each(image_key, patterns, f"{setting}.image_key")
    captions = _for_each(caption_key, patterns, f"{setting}.caption_key")
    places = [None] * len(patterns) if classes is None else _for_each(classes, patterns, f"{setting}.classes")
    readers = {}
    for name, pattern, image, caption, place in zip(_names(patterns), patterns, images, captions, places):
        opened = open_shards(pattern)
        found = find_classes(place, opened[0].shard) if find_classes and has_labels(caption) else None
        readers[name] = PairReader(opened, image, caption, setting, found)
    return readers


def has_labels(caption_key: CaptionKeys) -> bool:
    """Whether captions are made of labels, so that there must be class names."""
    return LABEL_EXTENSION in ([caption_key] if isinstance(caption_key, str) else caption_key)


def order_sources(
    sources: Mapping[str, PairReader], weights: Sequence[float] | None, *, seed: int, lanes: int, window: int
) -> SampleOrder | Mixture:
    """The stream over all sources: one set of all samples, or, with weights, fixed shares of each.

    Raises:
        ConfigError: weights that do not fit the sources.
        DataError: without weights, a shard is in two sources.
    """
    if weights is None:
        _check_distinct(sources)
        counts = [count for reader in sources.values() for count in reader.counts]
        return SampleOrder(counts, seed=seed, lanes=lanes, window=window)
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise ConfigError(f"data.train.weights={weights} is not a list, such as [3,1]")
    if len(weights) != len(sources):
        raise ConfigError(
            f"data.train.weights={list(weights)} are {len(weights)}, the sources of data.train.shards {len(sources)}"
            f" ({', '.join(sources)}): give one weight for each"
        )
    counts = {name: reader.counts for name, reader in sources.items()}
    return Mixture(counts, dict(zip(sources, weights)), seed=seed, lanes=lanes, window=window)


def _check_distinct(sources: Mapping[str, PairReader]) -> None:
    owner: dict[str, str] = {}
    for name, reader in sources.items():
        for shard in reader.shard_names:
            if owner.setdefault(shard, name) != name:
                raise DataError(f"data.train.shards names {shard} more than once, in {owner[shard]} and in {name}")


def split_sources(shards: str | Sequence[str]) -> list[str]:
    """One pattern for each source."""
    patterns = [shards] if isinstance(shards, str) else shards
    return [part for pattern in patterns for part in pattern.split("::")]


def _for_each(setting: Value | Sequence[Value], patterns: Sequence[str], name: str) -> Sequence[Value]:
    if isinstance(setting, str | Mapping):
        return [setting] * len(patterns)  # pyright: ignore[reportReturnType]
    values: Sequence[Value] = setting  # pyright: ignore[reportAssignmentType]
    if len(values) != len(patterns):
        raise ConfigError(f"{name} has {len(values)} entries, but there are {len(patterns)} sources: one for each")
    return values


def _names(patterns: Sequence[str]) -> list[str]:
    """Each source's folder, with a number where two would have the same name."""
    names: list[str] = []
    for number, pattern in enumerate(patterns):
        folder = PurePosixPath(pattern).parent.name
        name = folder if re.fullmatch(r"\w[\w.-]*", folder) else "source"
        while name in names:
            name = f"{name}_{number}"
        names.append(name)
    return names
