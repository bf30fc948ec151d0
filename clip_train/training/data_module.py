"""The training stream and the validation sets of a config."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import lightning as L
from torch.utils.data import DataLoader

from clip_train.data.augmentation import Augmentation
from clip_train.data.batches import Batch, TrainBatches
from clip_train.data.class_names import ClassNames, read_class_names
from clip_train.data.eval_batches import EvalBatches, SampleReader
from clip_train.data.feature_batches import FeatureBatches
from clip_train.data.files import user_cache
from clip_train.data.fingerprint import Description, describe, describe_shards, digest
from clip_train.data.index import ShardIndex
from clip_train.data.known_classes import known_classes
from clip_train.data.labelled import open_labelled
from clip_train.data.loader import BatchStarts, make_loader
from clip_train.data.mixture import Mixture
from clip_train.data.pairs import PairReader
from clip_train.data.remote import scheme_of
from clip_train.data.remote_shards import StagedShard, open_shards
from clip_train.data.shard_cache import parse_bytes
from clip_train.data.shards import expand_shards
from clip_train.data.sources import has_labels, open_sources, order_sources
from clip_train.data.staging import Stager
from clip_train.data.tokenizer_choice import CaptionTokenizer
from clip_train.errors import ConfigError, DataError
from clip_train.training.copied_ahead import CopiedAhead
from clip_train.training.launch import World, num_workers
from clip_train.training.module import ClipModule


class ClipDataModule(L.LightningDataModule):
    """Opens and checks all shards at once, so that what is wrong with them is said before anything starts.

    Args:
        data: the `data` group of the configs.
        image_size: what the model takes.
        tokenizer: captions to what the model takes.
        batch_size: pairs per step over all ranks.
        seed: decides order and augmentation.
        world: the processes of the run.
        zero_shot: the labelled sets of `eval.zero_shot`.

    Raises:
        DataError: shards are missing, damaged, or lack images or captions.
        ConfigError: a value of the group cannot be used.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        image_size: int,
        tokenizer: CaptionTokenizer,
        batch_size: int,
        seed: int,
        world: World,
        zero_shot: str | Sequence[str] | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.world, self.batch_size = world, batch_size
        self.num_workers = num_workers(data["num_workers"], world, "data.num_workers")
        self._cache_dir = data["cache_dir"]
        self._retries, self._timeout = data["retries"], data["timeout"]
        cache_size = parse_bytes(data["cache_size"], "data.cache_size")
        self.stager = Stager(self._cache_dir or user_cache(), cache_size, data["retries"], data["timeout"], "data.")
        train = data["train"]
        self.sources = open_sources(
            train["shards"],
            data["image_key"],
            data["caption_key"],
            lambda pattern: self._open_shards(pattern, "data.train.shards"),
            "data",
            data.get("classes"),
            partial(self._find_classes, "data.classes"),
        )
        self.batches = TrainBatches(
            reader=PairReader.join(list(self.sources.values())),
            order=order_sources(
                self.sources, train["weights"], seed=seed, lanes=data["lanes"], window=data["shuffle_window"]
            ),
            augmentation=Augmentation(**data["augmentation"]),
            tokenizer=tokenizer,
            image_size=image_size,
            batch_size=batch_size,
            rank=world.rank,
            world_size=world.size,
            decode=data["decode"],
            max_image_pixels=data["max_image_pixels"],
            word_dropout=data["word_dropout"],
            with_names=data["sample_log"],
            stager=self.stager,
        )
        self.batches.reader.keep_open(self.batches.order.shards_at_once(world.size))
        self.features: FeatureBatches | None = None
        val = {**data, **{key: value for key, value in data["val"].items() if value is not None}}
        make_batches = self._make_eval = partial(
            EvalBatches,
            tokenizer=tokenizer,
            image_size=image_size,
            resize_mode=val["resize_mode"],
            interpolation=val["interpolation"],
            max_image_pixels=data["max_image_pixels"],
        )
        self.val_sets = {
            name: make_batches(self._open_val(name, patterns, val))
            for name, patterns in _named_sets(data["val"]["shards"], "val").items()
        }
        self.zero_shot_sets = {
            name: make_batches(self._open_labelled(name, patterns, val), with_labels=True)
            for name, patterns in _named_sets(zero_shot, "zero_shot").items()
        }

    def _open_shards(self, patterns: str | Sequence[str], setting: str) -> list[ShardIndex | StagedShard]:
        shards = expand_shards(patterns, setting)
        return open_shards(shards, self.stager, self._cache_dir, self.world.rank, self.world.size)

    def _open_val(self, name: str, patterns: str | Sequence[str], val: Mapping[str, Any]) -> PairReader:
        shards = self._open_shards(patterns, "data.val.shards")
        for key in ("image_key", "caption_key", "classes"):
            if isinstance(val.get(key), list) and (key != "classes" or has_labels(val["caption_key"])):
                raise ConfigError(f"data.val.{key} is not given, and data.{key} has one entry per source: give one")
        classes = None
        if has_labels(val["caption_key"]):
            classes = self._find_classes("data.classes", val.get("classes"), shards[0].shard)
        reader = PairReader(shards, val["image_key"], val["caption_key"], "data.val", classes)
        if reader.num_incomplete:
            raise DataError(f"validation set {name}: {reader.num_incomplete} samples lack an image or a caption")
        return reader

    def _open_labelled(self, name: str, labelled: Any, val: Mapping[str, Any]) -> SampleReader:
        setting = f"eval.zero_shot.{name}"
        given = labelled if isinstance(labelled, Mapping) else {"shards": labelled}
        if not given.get("shards") or set(given) - {"shards", "classes", "classnames"}:
            raise ConfigError(f"{setting} is no pattern, nor {{shards: PATTERN, classes: PATH or classnames: NAME}}")
        if given.get("classes") and given.get("classnames"):
            raise ConfigError(f"{setting} has classes and classnames: leave one of them out")
        image_key = val["image_key"] if isinstance(val["image_key"], str) else ";".join(val["image_key"])
        shards = given["shards"]

        def choose_classes(own: Callable[[], ClassNames]) -> ClassNames:
            if dataset := given.get("classnames"):
                return known_classes(dataset, setting=f"{setting}.classnames")
            address = given.get("classes")
            return self._find_classes(f"{setting}.classes", address, "") if address else own()

        return open_labelled(
            shards if isinstance(shards, str) else "::".join(shards),
            "test",
            image_key=image_key,
            open_shards=lambda patterns: self._open_shards(patterns, f"{setting}.shards"),
            choose_classes=choose_classes,
            setting=setting,
            split_setting="folder",
            classes_setting=f"{setting}.classes",
            image_setting="data.val",
            retries=self._retries,
            timeout=self._timeout,
        )

    def _find_classes(self, setting: str, address: str | None, shard: str) -> ClassNames:
        return read_class_names(address, shard, setting, self._retries, self._timeout)

    def metrics(self, position: int) -> dict[str, float]:
        """How often a mixture has gone through each of its sources."""
        order = self.batches.order
        if not isinstance(order, Mixture):
            return {}
        return {f"data/epochs/{name}": passed for name, passed in zip(self.sources, order.epochs(position))}

    @cached_property
    def has_remote_shards(self) -> bool:
        """Whether training reads shards that have to be fetched."""
        return self.features is None and any(scheme_of(name) for name in self.batches.reader.shard_names)

    def describe_data(self) -> Description:
        """The training data, for checkpoints; `fingerprint.differences` compares two of them."""
        return describe(self.sources, self.batches.order)

    def fingerprint(self) -> str:
        """Differs where shards, their sizes, or their order differ, in the training or a validation set."""
        sets = [*self.val_sets.values(), *self.zero_shot_sets.values()]
        validation = [describe_shards(batches.reader) for batches in sets]
        return digest(self.describe_data(), *validation)

    @property
    def num_samples(self) -> int:
        """Pairs in the training set."""
        return len(self.batches.reader)

    @property
    def class_names(self) -> ClassNames:
        """Of the training set, if all of its samples have labels of the same classes. Raises ConfigError."""
        found = self.batches.reader.classes
        if len(found) != 1 or found[0] is None:
            raise ConfigError("finetune learns from labels: give data.caption_key=cls, and sources of the same classes")
        return found[0]

    def serve(self, batch_keys: Sequence[str]) -> None:
        """Put what a model asks for into the batches."""
        self.batches = replace(self.batches, with_labels="label" in batch_keys)

    def serve_features(self, features: FeatureBatches) -> None:
        """From now on, train on these."""
        self.features = features

    def unaugmented(self) -> EvalBatches:
        """The training set with its labels, as evaluation would see it; samples may be bad."""
        return self._make_eval(self.batches.reader, with_labels=True, keep_bad=True)

    def train_dataloader(self) -> CopiedAhead:
        """The stream from the module's position on."""
        trainer = cast(L.Trainer, self.trainer)
        module = cast(ClipModule, trainer.lightning_module)

        def send(batch: Batch) -> Batch:
            return module.send(trainer.precision_plugin.convert_input(batch))  # as Lightning would

        return CopiedAhead(self._loader(module), send, module.device)

    def _loader(self, module: ClipModule) -> DataLoader:
        starts = BatchStarts(module.position, self.batch_size)
        pin_memory = self.world.accelerator == "gpu"
        if self.features is not None:  # nothing to decode
            return make_loader(self.features, starts, num_workers=0, pin_memory=pin_memory)
        return make_loader(self.batches, starts, self.num_workers, pin_memory)


def _named_sets(shards: str | Sequence[str] | Mapping[str, Any] | None, otherwise: str) -> dict[str, Any]:
    """Patterns alone are one set, named after its folder where that can be; a mapping gives the names itself."""
    if shards is None:
        return {}
    if isinstance(shards, Mapping):
        return dict(shards)
    folder = Path(shards if isinstance(shards, str) else shards[0]).parent.name
    return {folder if re.fullmatch(r"\w[\w.-]*", folder) and "::" not in shards else otherwise: shards}
