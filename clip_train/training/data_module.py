"""The training stream and the validation sets of a config."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning as L
from torch.utils.data import DataLoader

from clip_train.data.batches import BatchStarts, EvalBatches, TrainBatches, make_loader
from clip_train.data.images import Augmentation
from clip_train.data.index import load_indexes
from clip_train.data.order import SampleOrder
from clip_train.data.pairs import PairReader
from clip_train.data.shards import expand_shards
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.errors import ConfigError, DataError
from clip_train.training.launch import World, cpus_per_process
from clip_train.training.module import ClipModule

_MOST_WORKERS = 8


class ClipDataModule(L.LightningDataModule):
    """Opens and checks all shards at once, so that what is wrong with them is said before anything starts.

    Args:
        data: the `data` group of the configs.
        image_size, context_length: what the model takes.
        batch_size: pairs per step over all ranks.
        seed: decides order and augmentation.
        world: the processes of the run.

    Raises:
        DataError: shards are missing, damaged, or lack images or captions.
        ConfigError: a value of the group cannot be used.
    """

    def __init__(
        self, data: Mapping[str, Any], *, image_size: int, context_length: int, batch_size: int, seed: int, world: World
    ) -> None:
        super().__init__()
        self.world, self.batch_size = world, batch_size
        self.num_workers = _num_workers(data["num_workers"], world)
        tokenizer = ClipTokenizer(context_length)
        reader = _open("data.train", data["train"]["shards"], data, "data", world)
        self.batches = TrainBatches(
            reader=reader,
            order=SampleOrder(reader.counts, seed=seed, lanes=data["lanes"], window=data["shuffle_window"]),
            augmentation=Augmentation(**data["augmentation"]),
            tokenizer=tokenizer,
            image_size=image_size,
            batch_size=batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        val = {**data, **{key: value for key, value in data["val"].items() if value is not None}}
        self.val_sets = {
            name: EvalBatches(
                _complete(_open("data.val", patterns, val, "data.val", world), name), tokenizer, image_size
            )
            for name, patterns in _named_sets(data["val"]["shards"]).items()
        }

    @property
    def num_samples(self) -> int:
        """Pairs in the training set."""
        return len(self.batches.reader)

    def train_dataloader(self) -> DataLoader:
        """The stream from the module's `samples_seen` on."""
        module = cast(ClipModule, cast(L.Trainer, self.trainer).lightning_module)
        starts = BatchStarts(module.samples_seen, self.batch_size)
        pin_memory = self.world.accelerator == "gpu"
        return make_loader(self.batches, starts, self.num_workers, pin_memory)


def _open(source: str, patterns, data: Mapping[str, Any], keys: str, world: World) -> PairReader:
    shards = expand_shards(patterns, f"{source}.shards")
    indexes = load_indexes(shards, data["cache_dir"], world.rank, world.size)
    return PairReader(indexes, data["image_key"], data["caption_key"], setting=keys)


def _complete(reader: PairReader, name: str) -> PairReader:
    if reader.num_incomplete:
        raise DataError(f"validation set {name}: {reader.num_incomplete} samples lack an image or a caption")
    return reader


def _named_sets(shards: str | list[str] | Mapping[str, str] | None) -> dict[str, str | list[str]]:
    """Patterns alone are one set, named after its folder; a mapping gives the names itself."""
    if shards is None:
        return {}
    if isinstance(shards, Mapping):
        return dict(shards)
    folder = Path(shards if isinstance(shards, str) else shards[0]).parent.name
    return {folder if re.fullmatch(r"\w[\w.-]*", folder) and "::" not in shards else "val": shards}


def _num_workers(setting: int | str, world: World) -> int:
    if setting == "auto":
        return min(_MOST_WORKERS, cpus_per_process(world))
    if not isinstance(setting, int) or setting < 0:
        raise ConfigError(f"data.num_workers={setting} is neither a number nor auto")
    return setting
