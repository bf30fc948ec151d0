"""Features of two labelled sets, one to learn from and one to be asked about, and what was said of the second."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from omegaconf import DictConfig
from torch import Tensor

from clip_train.data.class_names import ClassNames
from clip_train.data.eval_batches import EvalBatches
from clip_train.data.files import user_cache
from clip_train.distributed import gather_parts, own_part
from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.classification import Predictions
from clip_train.evaluation.feature_cache import compute_features, features_key
from clip_train.evaluation.labelled_set import LabelledSet, data_address, open_labelled_set
from clip_train.evaluation.loaded_model import LoadedModel, check_numbers
from clip_train.evaluation.zero_shot import set_classes
from clip_train.models.linear_probe import FEATURES, image_features
from clip_train.typed_config import typed


@dataclass(frozen=True)
class TrainingSet:
    """Where the labelled images to learn from are, and what is learned from.

    Attributes:
        train: a set as `data` takes them; None for the part `train_split` of `data`.
        train_split: which part of a set that has several.
        features: `embedding` or `trunk`.
    """

    train: str | None
    train_split: str
    features: str

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise ConfigError(f"task.features={self.features} is none of {', '.join(FEATURES)}")


class Samples(NamedTuple):
    """Features and labels of a whole set."""

    features: Float[np.ndarray, "n width"]
    labels: Int64[np.ndarray, " n"]

    def take(self, rows: Sequence[int] | np.ndarray | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features and labels of some, on a device."""
        return torch.from_numpy(self.features[rows]).to(device), torch.from_numpy(self.labels[rows]).to(device)

    def take_share(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of this rank's contiguous part."""
        part = own_part(len(self.labels))
        return self.take(slice(part.start, part.stop), device)


class Probe(NamedTuple):
    """What a classifier of frozen features is made and measured with.

    Attributes:
        name: of the set to be asked about.
        classes: of both sets.
    """

    name: str
    classes: ClassNames
    train: Samples
    test: Samples

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def open_probe(loaded: LoadedModel, cfg: DictConfig) -> Probe:
    """The features of both sets that a task names, computed by all ranks where they are not on disk already.

    Raises:
        ConfigError: a value cannot be used, or the sets' classes differ.
        DataError: a set cannot be read, or features cannot be written.
    """
    chosen, learned = typed(LabelledSet, cfg.task, "task"), typed(TrainingSet, cfg.task, "task")
    name, test = open_labelled_set(chosen, loaded, cfg)
    train_part = replace(chosen, split=learned.train_split)
    address, setting = learned.train or data_address(cfg), "task.train" if learned.train else "data"
    _, train = open_labelled_set(train_part, loaded, cfg, address, setting, "task.train_split")
    if train.reader.shard_names == test.reader.shard_names:
        raise ConfigError(f"{setting}={address}: these are the images that data names; give task.train=...")
    classes = set_classes(test)
    if (others := set_classes(train)).names != classes.names:
        raise ConfigError(
            f"the classes of task.train and data differ: {len(others)}, the first of which is {others.names[0]!r}, and"
            f" {len(classes)}, the first of which is {classes.names[0]!r}; give task.classes"
        )
    return Probe(name, classes, *(_samples(loaded, cfg, part, learned.features) for part in (train, test)))


def _samples(loaded: LoadedModel, cfg: DictConfig, pictures: EvalBatches, features: str) -> Samples:
    precision = f"{loaded.precision} on {loaded.device.type}"
    key = features_key(loaded.model, features, pictures, cfg.data.image_key, precision)
    folder = Path(cfg.data.cache_dir or user_cache()) / f"features_{key}"
    table = compute_features(
        lambda pixels: image_features(loaded.model, pixels, features),
        pictures,
        folder,
        batch_size=loaded.batch_size,
        num_workers=loaded.num_workers,
        autocast=loaded.autocast,
        device=loaded.device,
    )
    if table.bad:  # a run that may leave samples out has computed them
        raise DataError(f"{len(table.bad)} samples cannot be used: {next(iter(table.bad.values())).reason}")
    samples = Samples(np.concatenate(table.chunks), table.labels)
    check_numbers(torch.from_numpy(samples.features))
    return samples


def judged(
    scores: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], ranks: Int64[Tensor, " n"]
) -> Float[Tensor, "n 4"]:
    """What `gather_predictions` takes: of each image its label, the predicted class, its own's rank, the probability.

    Args:
        scores: probabilities of the classes.
        ranks: how many classes come before the image's own.
    """
    best = scores.max(dim=1)
    return torch.stack([column.float() for column in (labels, best.indices, ranks, best.values)], dim=1)


def gather_predictions(own: Sequence[Float[Tensor, "tile 4"]], count: int, device: torch.device) -> Predictions:
    """What all ranks said of their shares of a set of `count` images."""
    rows = torch.cat([torch.empty(0, 4, device=device), *own])
    label, predicted, rank, confidence = gather_parts(rows, count).cpu().unbind(1)
    return Predictions(label.long(), predicted.long(), rank.long(), confidence)
