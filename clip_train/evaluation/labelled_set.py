"""The labelled set that a task of `clip-eval` names, with the class names that it is to have."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from omegaconf import DictConfig, OmegaConf

from clip_train.data.class_names import ClassNames, read_class_names
from clip_train.data.eval_batches import EvalBatches, SampleReader
from clip_train.data.files import utf8
from clip_train.data.fingerprint import describe_shards, digest
from clip_train.data.known_classes import known_classes, known_templates
from clip_train.data.labelled import Shards, open_labelled, set_name
from clip_train.data.pairs import PairReader
from clip_train.data.remote_shards import open_shards
from clip_train.data.shards import expand_shards
from clip_train.distributed import agreed, gather_objects, group_rank, group_size
from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.loaded_model import LoadedModel
from clip_train.shard_tools.access import ShardAccess
from clip_train.typed_config import typed


@dataclass(frozen=True)
class LabelledSet:
    """Which set, and what its classes are called.

    Attributes:
        split: which part of a set that has several.
        dataset: its name in the results; None for its folder's.
        classes: file or folder of class names or prompts; None for those of the data.
        classnames, templates: under clip-benchmark's names of sets, in place of `classes`.
        language: of those.

    Raises:
        ConfigError: class names from two places.
    """

    split: str
    dataset: str | None
    classes: str | None
    classnames: str | None
    templates: str | None
    language: str

    def __post_init__(self) -> None:
        for key in ("classnames", "templates"):
            if self.classes is not None and getattr(self, key) is not None:
                raise ConfigError(f"task.classes and task.{key} are both given: leave one of them out")

    def choose_classes(self, own: Callable[[], ClassNames], retries: int = 10, timeout: float = 60.0) -> ClassNames:
        """The class names: those that were asked for, else the set's own.

        Args:
            own: finds these.
            retries, timeout: see `read_class_names`.

        Raises:
            ConfigError: clip-benchmark does not know them.
            DataError: they cannot be read, or there are none.
        """
        if self.classes is not None:
            return read_class_names(self.classes, "", "task.classes", retries, timeout)
        found = own() if self.classnames is None else known_classes(self.classnames, self.language)
        if self.templates is None:
            return found
        return replace(found, templates=known_templates(self.templates, self.language), prompts=None)


def open_labelled_set(
    chosen: LabelledSet,
    loaded: LoadedModel,
    cfg: DictConfig,
    address: str | None = None,
    setting: str = "data",
    split_setting: str = "task.split",
) -> tuple[str, EvalBatches]:
    """A set's name, and its batches with labels.

    Args:
        chosen: from the task's config.
        loaded: whose preprocessing and tokenizer to use.
        cfg: the whole config.
        address: of the set; None for the config's `data`.
        setting, split_setting: where the address and its part are in the config, for errors.

    Raises:
        ConfigError: a value cannot be used.
        DataError: on every rank, if one cannot read the set, or sees another one.
    """
    address = address or data_address(cfg)
    access = shard_access(cfg)
    with agreed():
        reader = open_labelled(
            address,
            chosen.split,
            image_key=image_key(cfg),
            open_shards=shard_opener(access, setting),
            choose_classes=partial(chosen.choose_classes, retries=access.retries, timeout=access.timeout),
            setting=setting,
            split_setting=split_setting,
            retries=access.retries,
            timeout=access.timeout,
        )
    check_same(reader, f"{setting}={address}")
    return chosen.dataset or set_name(address, chosen.split), eval_batches(reader, loaded, cfg, with_labels=True)


def check_same(reader: SampleReader, setting: str) -> None:
    """Raises DataError on every rank if they do not see the same set.

    Args:
        setting: the config key and its value, for the error.
    """
    about = describe_shards(reader)
    if not isinstance(reader, PairReader):  # files in a folder are not told by its name and their number
        keys = [reader.key(shard, n) for shard, count in enumerate(reader.counts) for n in range(count)]
        about["keys"] = hashlib.sha256(utf8("\n".join(keys))).hexdigest()
    if len(set(gather_objects([digest(about)]))) > 1:
        raise DataError(
            f"{setting}: the ranks see different shards, pictures or class names, or different numbers of samples"
        )


def data_address(cfg: DictConfig) -> str:
    """What `data` names; several sources with `::` between."""
    path = cfg.data.path
    return "::".join(path) if OmegaConf.is_list(path) else str(path)


def image_key(cfg: DictConfig) -> str:
    """Extensions of pictures, `;` between them. Raises ConfigError if it is no such text."""
    if not isinstance(cfg.data.image_key, str) or not cfg.data.image_key:
        raise ConfigError(f"data.image_key={cfg.data.image_key} is not extensions of pictures such as 'jpg;png'")
    return cfg.data.image_key


def shard_access(cfg: DictConfig) -> ShardAccess:
    """The config's settings of caches and downloads. Raises ConfigError if a value cannot be used."""
    try:
        return typed(ShardAccess, cfg.data, "data")
    except ConfigError as error:  # programs that have no group `data` call the keys without it
        raise ConfigError(f"data.{str(error).removeprefix('data.')}") from error


def shard_opener(access: ShardAccess, setting: str = "data") -> Callable[[str | Sequence[str]], Shards]:
    """From patterns to shards.

    Args:
        setting: where the patterns are in the config, for errors.
    """

    def open_them(patterns: str | Sequence[str]) -> Shards:
        found = expand_shards(patterns, setting)
        return open_shards(found, access.make_stager("data."), access.cache_dir, group_rank(), group_size())

    return open_them


def eval_batches(
    reader: SampleReader,
    loaded: LoadedModel,
    cfg: DictConfig,
    *,
    with_labels: bool = False,
    with_captions: bool = False,
) -> EvalBatches:
    """Batches with the model's preprocessing and tokenizer."""
    return EvalBatches(
        reader,
        loaded.tokenizer,
        loaded.source.image_size,
        loaded.source.resize_mode,
        loaded.source.interpolation,
        cfg.data.max_image_pixels,
        with_labels=with_labels,
        with_captions=with_captions,
    )
