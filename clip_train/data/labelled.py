"""Labelled sets: shards, folders as clip-benchmark's `wds_*` sets are, folders of class folders."""

import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from clip_train.data.beside import read_if_there
from clip_train.data.class_folders import ClassFolders, find_class_folders, folder_classes
from clip_train.data.class_names import LABEL_EXTENSION, ClassNames, read_class_names
from clip_train.data.eval_batches import SampleReader
from clip_train.data.index import ShardIndex
from clip_train.data.pairs import PairReader, RemoteShard
from clip_train.data.remote import scheme_of
from clip_train.errors import DataError

NSHARDS_TXT = "nshards.txt"

Shards = Sequence[ShardIndex | RemoteShard]
ChooseClasses = Callable[[Callable[[], ClassNames]], ClassNames]


def read_labelled(
    shards: Shards, classes: ClassNames, image_key: str, setting: str, image_setting: str = "data"
) -> PairReader:
    """A reader of shards with `cls` files.

    Args:
        classes: what the labels stand for.
        image_key: extensions that hold the picture.
        setting: where the shards are in the config, for errors.
        image_setting: where its `image_key` is.

    Raises:
        DataError: a sample has no picture or no label.
    """
    for shard in shards:
        if isinstance(shard, ShardIndex) and LABEL_EXTENSION not in shard.extensions:
            raise DataError(f"{setting}: {shard.shard} has no labels ({LABEL_EXTENSION} files): it is no labelled set")
    reader = PairReader(shards, image_key, LABEL_EXTENSION, image_setting, classes)
    if reader.num_incomplete:
        raise DataError(f"{setting}: {reader.num_incomplete} samples lack an image or a label")
    return reader


def open_labelled(
    address: str,
    split: str,
    *,
    image_key: str,
    open_shards: Callable[[str | Sequence[str]], Shards],
    choose_classes: ChooseClasses = lambda own: own(),
    setting: str = "data",
    split_setting: str = "task.split",
    classes_setting: str = "task.classes",
    image_setting: str = "data",
    retries: int = 10,
    timeout: float = 60.0,
) -> SampleReader:
    """A labelled set by its address.

    Args:
        address: a pattern of shards; a folder of shards, as clip-benchmark's `wds_*` sets are, here or as a URL; a
            folder with a folder of pictures for each class. A folder may have such parts as `train` and `test`.
        split: which part.
        image_key: extensions that hold the picture, `;` between them.
        open_shards: from patterns to shards.
        choose_classes: takes the function that finds the set's own class names; returns those to use.
        setting, split_setting, classes_setting, image_setting: where address, part, class names and `image_key` are in
            the config, for errors.
        retries, timeout: of a small file elsewhere, see `read_if_there`.

    Raises:
        DataError: there is no such set, or it cannot be read.
    """
    patterns = shard_patterns(address, split, setting, split_setting, retries, timeout)
    if patterns is not None:
        shards = open_shards(patterns)
        classes = choose_classes(lambda: read_class_names(None, shards[0].shard, classes_setting, retries, timeout))
        return read_labelled(shards, classes, image_key, setting, image_setting)
    folder = _part(Path(os.path.expanduser(address)), split)
    found = find_class_folders(folder, image_key.split(";"), setting)
    return ClassFolders(folder, found, choose_classes(lambda: folder_classes(folder, found)))


def shard_patterns(
    address: str,
    split: str,
    setting: str = "data",
    split_setting: str = "task.split",
    retries: int = 10,
    timeout: float = 60.0,
) -> str | list[str] | None:
    """The shards that an address stands for; None for a folder without any.

    Args:
        address, split, setting, split_setting, retries, timeout: as for `open_labelled`.

    Raises:
        DataError: the number in `nshards.txt` is none, or there is no such file under a URL.
    """
    if scheme_of(address) and ".tar" not in address and "::" not in address and scheme_of(address) != "pipe":
        shards = _numbered(f"{address.rstrip('/')}/{split}", retries, timeout)
        if shards is None:
            raise DataError(
                f"{setting}={address}: there is no {split}/{NSHARDS_TXT}; give shards, or another {split_setting}"
            )
        return shards
    place = os.path.expanduser(address)
    if scheme_of(address) or not os.path.isdir(place):  # False, where pathlib raises, for what cannot be a name
        return address
    folder = _part(Path(place), split)
    there_are = any(folder.glob("*.tar"))
    return _numbered(str(folder), retries, timeout) or (f"{glob.escape(str(folder))}/*.tar" if there_are else None)


def set_name(address: str, split: str) -> str:
    """What to call the set of an address: its folder, or on the Hub (`NAME/resolve/main`) its repository."""
    path = PurePosixPath(address)
    folder = path.parent if ".tar" in path.name else path
    folder = folder.parent if folder.name == split else folder
    on_the_hub = scheme_of(address) and folder.parent.name == "resolve"
    return (folder.parent.parent if on_the_hub else folder).name or "data"


def _part(folder: Path, split: str) -> Path:
    return folder / split if (folder / split).is_dir() else folder


def _numbered(folder: str, retries: int, timeout: float) -> list[str] | None:
    """`0.tar`, `1.tar` and so on, as many as `nshards.txt` says; None if it is not there."""
    content = read_if_there(f"{folder}/{NSHARDS_TXT}", retries, timeout)
    if content is None:
        return None
    number = content.strip()
    if not number.isdigit() or int(number) < 1:
        raise DataError(f"{folder}/{NSHARDS_TXT} says {number[:40]!r}, not a number of shards")
    return [f"{folder}/{shard}.tar" for shard in range(int(number))]
