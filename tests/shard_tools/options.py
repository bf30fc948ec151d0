"""The options of a sub-command with the defaults of its config, and small sets to make shards of."""

import csv
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from clip_train.commands.program import config_dir
from clip_train.shard_tools.access import ShardAccess
from clip_train.shard_tools.make import MadeShards, MakeOptions, make_shards
from clip_train.shard_tools.pictures import Resizing
from clip_train.shard_tools.samples import Selection
from clip_train.shard_tools.source import TableColumns
from clip_train.typed_config import typed
from tests.conftest import encode_image

NUM_PICTURES = 5


def options(kind: type, command: str, **changes: Any) -> Any:
    """An instance of `kind` from `configs/shards_COMMAND.yaml` and the changes."""
    config = OmegaConf.load(f"{config_dir()}/shards_{command}.yaml")
    assert isinstance(config, DictConfig)
    names = {field.name for field in fields(kind)}
    config.update({key: value for key, value in changes.items() if key in names})
    return typed(kind, config)


def make(source: str | Path, output: str | Path, **changes: Any) -> MadeShards:
    """`make_shards` in this process, unless `num_workers` says otherwise."""
    changes = {"source": str(source), "output": str(output), "num_workers": 1, **changes}
    return make_shards(*(options(kind, "make", **changes) for kind in (MakeOptions, TableColumns, Resizing)))


def select(**changes: Any) -> Selection:
    """All samples, unless the changes say otherwise."""
    return options(Selection, "verify", **changes)


def access(**changes: Any) -> ShardAccess:
    """Indexes beside the shards, unless the changes say otherwise."""
    return options(ShardAccess, "verify", **changes)


def write_table(folder: Path, count: int, bad: Iterable[int] = ()) -> Path:
    """A CSV of `count` rows over a few pictures; the rows in `bad` name one that is damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_PICTURES):
        (folder / f"{number}.png").write_bytes(encode_image(number))
    (folder / "bad.png").write_bytes(encode_image(0)[:100])
    bad = set(bad)
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "caption", "licence"])
        for row in range(count):
            name = "bad.png" if row in bad else f"{row % NUM_PICTURES}.png"
            writer.writerow([name, f"caption {row}", f"licence {row % 3}"])
    return folder / "table.csv"
