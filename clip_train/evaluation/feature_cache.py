"""The features of a set under a frozen image tower: computed once, shared by all ranks, kept on disk."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clip_train.checkpoints.base import weights_checksum
from clip_train.data.eval_batches import EvalBatches
from clip_train.data.feature_batches import FeatureTable, chunk_parts, chunk_paths, write_chunk
from clip_train.data.fingerprint import describe_shards
from clip_train.data.loader import make_loader
from clip_train.distributed import agreed, group_rank, group_size, of_first_rank
from clip_train.errors import DataError
from clip_train.evaluation.progress import told
from clip_train.models import DualEncoder

log = logging.getLogger(__name__)


def features_key(
    model: DualEncoder, features: str, pictures: EvalBatches, image_key: str | list[str], precision: str
) -> str:
    """Differs where another set, another tower, or another preparation of pictures gives other features.

    To be asked before the weights are sharded.

    Args:
        model: whose image tower makes them.
        features: which, as for `image_features`.
        pictures: with labels.
        image_key: of the config.
        precision: what is computed in, and where.
    """
    tower = {name: tensor.cpu() for name, tensor in model.vision.state_dict().items()}
    about = {
        "tower": weights_checksum(tower),
        "layers": repr(model.vision),  # activations and pooling, which have no weights
        "features": features,
        "shards": {key: value for key, value in describe_shards(pictures.reader).items() if key != "classes_sha256"},
        "files": [_version(name) for name in pictures.reader.shard_names],
        "image_key": image_key,
        "pictures": [pictures.image_size, pictures.resize_mode, pictures.interpolation, pictures.max_image_pixels],
        "pixels": [model.image_mean.flatten().tolist(), model.image_std.flatten().tolist()],
        "classes": [classes.names if classes else () for classes in pictures.reader.classes],  # not their captions
        "precision": precision,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _version(shard: str) -> list:
    """Its path or address, and of a file here, or of those in a folder, the sizes and when they were written."""
    if os.path.isdir(shard):
        return [_version(str(path)) for path in sorted(Path(shard).rglob("*")) if path.is_file()]
    if not os.path.exists(shard):
        return [shard, 0, 0]
    found = os.stat(shard)
    return [os.path.abspath(shard), found.st_size, found.st_mtime_ns]


@torch.no_grad()
def compute_features(
    image_features: Callable[[Tensor], Tensor],
    pictures: EvalBatches,
    folder: Path,
    *,
    batch_size: int,
    num_workers: int,
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
) -> FeatureTable:
    """Write what is missing of a set's features, and open them all; the ranks share the work, file by file.

    Args:
        folder: theirs alone, shared by all ranks; the first rank's name of it counts, and what that one finds there:
            what the name is made of, such as the times of files, may differ between nodes.

    Raises:
        DataError: on every rank, if a shard cannot be read, or a file not be written or read.
    """
    folder, parts = of_first_rank(folder), chunk_parts(len(pictures))
    missing = of_first_rank([number for number in range(len(parts)) if not chunk_paths(folder, number)[1].exists()])
    own = missing[group_rank() :: group_size()]
    if missing:
        log.info("computing the features of %d samples, once, to %s", len(pictures), folder)
    with agreed(batch_size), _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        slices = [parts[n][start : start + batch_size] for n in own for start in range(0, len(parts[n]), batch_size)]
        loader = make_loader(pictures, slices, num_workers) if slices else ()
        batches = told(loader, sum(len(parts[number]) for number in missing))
        for number in own:
            features, labels, bad = [], [], []
            while len(labels) < len(parts[number]):
                batch = next(batches)
                if batch["error"]:
                    raise DataError(batch["error"])
                with autocast():
                    features.append(image_features(batch["image"].to(device)).float().cpu().numpy())
                labels += batch["label"].tolist()
                bad += batch["bad"]
            write_chunk(folder, number, np.concatenate(features), labels, bad)
        next(batches, None)  # there is none, and the log tells of the end
    with agreed():
        try:
            return FeatureTable.open(folder, len(pictures))
        except DataError as error:
            if group_size() == 1:
                raise
            raise DataError(f"{error}, and let all ranks share data.cache_dir") from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"features cannot be written to {folder}: {error.strerror or error}") from error
