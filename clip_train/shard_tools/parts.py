"""Parts: short runs of samples in temporary tars, from which shards are cut when it is known what is usable."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.writer import TarWriter

from clip_train.data.captions import CaptionKey, UnusableCaption
from clip_train.data.files import whole_file, write_atomic
from clip_train.shard_tools.damage import Damage
from clip_train.shard_tools.pictures import Picture, Resizing
from clip_train.shard_tools.source import Record

_TXT = CaptionKey.parse("txt")
_RECORD_SIZE = 10240  # tars are filled up with zeros to a multiple of this
_END_MARK = 1024
_COPIED_AT_ONCE = 1 << 20


class _UnreadableJson(ValueError):
    kind = "json_unreadable"


@dataclass(frozen=True)
class Part:
    """What a part holds, kept beside its tar; it is there only if the tar is whole.

    Attributes:
        number: which part, from 0.
        offsets: byte where each sample begins, and at last where they end.
        skipped: records that cannot be used.
    """

    number: int
    offsets: list[int]
    skipped: list[Damage]

    @property
    def num_samples(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class PartTask:
    """The records of one part, and what to make of them."""

    folder: str
    number: int
    records: Sequence[Record]
    resizing: Resizing


@dataclass(frozen=True)
class CutTask:
    """A shard as byte ranges of parts: (path, first, last)."""

    shard: str
    ranges: Sequence[tuple[str, int, int]]


def part_path(folder: str, number: int) -> str:
    """The tar of a part."""
    return os.path.join(folder, f"{number:06d}.tar")


def read_part(folder: str, number: int) -> Part | None:
    """What was written of a part by an earlier run, if it was finished."""
    try:
        content = json.loads(Path(folder, f"{number:06d}.json").read_bytes())
    except FileNotFoundError:
        return None
    return Part(number, content["offsets"], [Damage(*damage) for damage in content["skipped"]])


def write_part(task: PartTask) -> Part:
    """Read, check and write the samples of one part."""
    offsets, skipped = [0], []
    path = part_path(task.folder, task.number)
    with whole_file(path) as file, TarWriter(file, encoder=False, mtime=0) as writer:  # always the same bytes
        for record in task.records:
            sample = _sample(record, task.resizing)
            if isinstance(sample, Damage):
                skipped.append(sample)
            else:
                writer.write(sample)
                offsets.append(writer.tarstream.offset)
    part = Part(task.number, offsets, skipped)
    write_atomic(os.path.join(task.folder, f"{task.number:06d}.json"), json.dumps(asdict(part)).encode())
    return part


def cut_shard(task: CutTask) -> CutTask:
    """Write one shard: what a tar holds of a sample does not depend on its place, so ranges of bytes can be joined."""
    with whole_file(task.shard) as target:
        for path, first, last in task.ranges:
            with open(path, "rb") as source:
                _copy(source, target, first, last - first)
        size = target.tell() + _END_MARK
        target.write(bytes(_END_MARK + -size % _RECORD_SIZE))
    return task


def _copy(source: BinaryIO, target: BinaryIO, offset: int, count: int) -> None:
    source.seek(offset)
    while count:
        content = source.read(min(count, _COPIED_AT_ONCE))
        if not content:
            raise OSError(f"{source.name} got shorter")
        target.write(content)
        count -= len(content)


def _sample(record: Record, resizing: Resizing) -> dict[str, Any] | Damage:
    if not record.image:
        return _damage(record, "image_missing", "the row names no picture")
    beside = os.path.splitext(record.image)[0]
    try:
        captions = _read_captions(f"{beside}.txt") if record.captions is None else record.captions
        caption = captions[0].encode()
        columns = _read_json(f"{beside}.json") if record.columns is None else record.columns
        picture = resizing(Path(record.image).read_bytes())
    except IndexError:
        return _damage(record, "caption_empty", "empty caption")
    except UnicodeEncodeError as error:
        return _damage(record, "caption_not_utf8", error)
    except FileNotFoundError as error:
        return _damage(record, "image_missing", error)
    except (UnusableCaption, _UnreadableJson, OSError, ValueError) as error:
        return _damage(record, getattr(error, "kind", "image_unreadable"), error)
    sample = {"__key__": record.key, picture.extension: picture.encoded, "txt": caption}
    if columns or len(captions) > 1:
        sample["json"] = _describe(record.key, captions, columns, picture)
    return sample


def _damage(record: Record, kind: str, detail: object) -> Damage:
    return Damage(kind, record.image, record.key, " ".join(str(detail).split()))


def _read_captions(path: str) -> Sequence[str]:
    try:
        return _TXT.read(Path(path).read_bytes())
    except OSError as error:
        raise UnusableCaption(str(error), "caption_missing") from error


def _read_json(path: str) -> Mapping[str, Any]:
    try:
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _UnreadableJson(f"{path}: {error}") from error
    return value if isinstance(value, dict) else {"json": value}


def _describe(key: str, captions: Sequence[str], columns: Mapping[str, Any], picture: Picture) -> bytes:
    """The sample's .json, with img2dataset's names for what both know."""
    several = {"captions": list(captions)} if len(captions) > 1 else {}
    own = {"key": key, "caption": captions[0], **several, "width": picture.width, "height": picture.height}
    return json.dumps({**columns, **own}, default=str).encode()
