"""What is embedded, in parts, whoever shares them: shards, or runs of a folder's pictures."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from clip_train.data.index import ABSENT, ShardIndex
from clip_train.data.picture_files import find_pictures, pictures_in
from clip_train.data.remote import scheme_of
from clip_train.data.shards import expand_shards
from clip_train.embedding.options import IMAGE, TEXT, EmbedOptions
from clip_train.errors import ConfigError, DataError
from clip_train.shard_tools.access import ShardAccess
from clip_train.shard_tools.samples import SampleTask, Selection, check_key

_LOOKED_AT = 8  # shards in which files are looked for that another lacks, before a key is taken to be wrong


class Sample(NamedTuple):
    """One sample's files, still encoded, and where they are.

    Attributes:
        image_path: of the picture, or its name in the shard.
        shard: path or address; empty for a file on its own.
        offset: byte in the shard where the picture begins; -1 for a file on its own, or none.
    """

    key: str
    image_path: str
    shard: str
    offset: int
    image: bytes | None
    files: Mapping[str, bytes]


class Task(Protocol):
    """Some samples of a part, in their order."""

    def __len__(self) -> int: ...

    def read(self) -> Iterator[Sample]:
        """Raises DataError if they are no longer there."""
        ...


class Source(Protocol):
    """One part of the data."""

    @property
    def name(self) -> str:
        """What the manifest calls it."""
        ...

    def stamp(self) -> str:
        """Differs when what is embedded has changed. Raises DataError."""
        ...

    def tasks(self) -> list[Task]:
        """All samples, in batches. Raises DataError."""
        ...


def find_sources(options: EmbedOptions, access: ShardAccess) -> Sequence[Source]:
    """The parts of `options.data`, in their order.

    Raises:
        DataError: a shard is missing, or the data cannot be read.
        ConfigError: the folder has no pictures, or pictures and shards.
    """
    try:
        return _find_sources(options, access)
    except OSError as error:
        raise DataError(f"data={options.data} cannot be read: {error.strerror or error}") from error


def _find_sources(options: EmbedOptions, access: ShardAccess) -> Sequence[Source]:
    place = os.path.expanduser(options.data)
    if os.path.isdir(place):  # False, where pathlib raises, for what cannot be a name
        folder = Path(place)
        if not any(folder.glob("*.tar")):
            return _of_pictures(str(folder), options)
        if picture := next(pictures_in(folder), None):
            raise ConfigError(
                f"data={folder} has shards, and pictures too, such as {picture}: give data='{folder}/*.tar' for the"
                " shards, or a folder of the pictures alone"
            )
        shards = expand_shards(str(folder / "*.tar"), "data")
    else:
        shards = expand_shards(options.data.split("::"), "data")
    names = [shard if scheme_of(shard) else os.path.abspath(shard) for shard in shards]
    return [ShardSource(name, names[:_LOOKED_AT], options, access) for name in names]


@dataclass(frozen=True)
class ShardSource:
    """A shard is a part.

    Attributes:
        first: shards of the set, in which a key is looked for that this one has no files of.
    """

    name: str
    first: Sequence[str]
    options: EmbedOptions
    access: ShardAccess

    def stamp(self) -> str:
        if scheme_of(self.name):
            return self.name
        try:
            found = os.stat(self.name)
        except OSError as error:
            raise DataError(f"cannot read shard {self.name}: {error.strerror}") from error
        return f"{self.name} {found.st_size} {found.st_mtime_ns}"

    def tasks(self) -> list[Task]:
        index, size = self.access.index(self.name), self.options.batch_size
        selection = Selection(self.options.image_key, self.options.caption_key, num_samples=None, seed=0)
        if IMAGE in self.options.sides:
            self._check_key(index, "image_key", selection.image_key, selection.image_extensions)
        if TEXT in self.options.sides:
            self._check_key(index, "caption_key", selection.caption_key, selection.captions.extensions)
        extras = ("json",) if self.options.metadata else ()
        rows = range(index.num_samples)
        return [
            _ShardTask(SampleTask(index, rows[start : start + size], selection, self.access, extras))
            for start in range(0, len(rows), size)
        ]

    def _check_key(self, index: ShardIndex, setting: str, value: object, extensions: Sequence[str]) -> None:
        """One shard may lack such files, and its samples are listed as left out; in all, the key is wrong."""
        if not set(extensions) & set(index.extensions):
            check_key([index, *map(self.access.index, self.first)], f"data.{setting}", value, extensions)


@dataclass(frozen=True)
class _ShardTask:
    task: SampleTask

    def __len__(self) -> int:
        return len(self.task.rows)

    def read(self) -> Iterator[Sample]:
        for stored in self.task.read():
            name = f"{stored.key}.{stored.image_extension}" if stored.image_extension else ""
            yield Sample(stored.key, name, stored.shard, stored.image_offset, stored.image, stored.captions)


@dataclass(frozen=True)
class PictureSource:
    """A run of a folder's pictures is a part."""

    name: str
    folder: Path
    paths: Sequence[Path]
    options: EmbedOptions

    def stamp(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            for file in (path, *(path.with_suffix(f".{extension}") for extension in self._beside)):
                try:
                    found = file.stat()
                except FileNotFoundError as error:
                    if file == path:
                        raise DataError(f"{path} cannot be read: {error.strerror}") from error
                    continue
                except OSError as error:
                    raise DataError(f"{file} cannot be read: {error.strerror}") from error
                digest.update(f"{file} {found.st_size} {found.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def tasks(self) -> list[Task]:
        size, beside = self.options.batch_size, self._beside
        starts = range(0, len(self.paths), size)
        return [_PictureTask(self.folder, self.paths[start : start + size], beside) for start in starts]

    @property
    def _beside(self) -> tuple[str, ...]:
        """Extensions of the files beside a picture that are read."""
        return self.options.captions.extensions + (("json",) if self.options.metadata else ())


@dataclass(frozen=True)
class _PictureTask:
    folder: Path
    paths: Sequence[Path]
    extensions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self) -> Iterator[Sample]:
        for path in self.paths:
            found = ((extension, path.with_suffix(f".{extension}")) for extension in self.extensions)
            try:
                image = path.read_bytes()
                files = {extension: file.read_bytes() for extension, file in found if file.exists()}
            except OSError as error:
                raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
            key = str(path.relative_to(self.folder).with_suffix(""))
            yield Sample(key, str(path), "", ABSENT, image, files)


def _of_pictures(given: str, options: EmbedOptions) -> list[Source]:
    folder = Path(given).absolute()
    paths, size = find_pictures(str(folder), "data"), options.samples_per_part
    parts = [paths[start : start + size] for start in range(0, len(paths), size)]
    return [PictureSource(f"{folder}[{number}]", folder, part, options) for number, part in enumerate(parts)]
