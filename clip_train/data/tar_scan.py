"""One pass over a tar's headers: where each member's bytes lie.

Ten times as fast as the standard library's `tarfile`, which builds an object per member, and strict where that module
takes a damaged header or a missing end for the end of the archive.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from clip_train.errors import DataError

_BLOCK = 512
_MOST_FILLING = 1 << 20


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    offset: int
    size: int


def scan_tar(path: str) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar, in order.

    Raises:
        DataError: the file is no tar, is damaged, or ends early.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from error
    try:
        yield from _scan(descriptor, path)
    finally:
        os.close(descriptor)


def _scan(descriptor: int, path: str) -> Iterator[Member]:
    end_of_file = os.fstat(descriptor).st_size
    offset, long_name = 0, None
    while True:
        header = os.pread(descriptor, _BLOCK, offset)
        if len(header) == _BLOCK and not any(header):
            _check_end(descriptor, path, offset, end_of_file)
            return
        if len(header) < _BLOCK and offset > 0:
            raise DataError(_cut_short(path, end_of_file, "no end-of-archive mark"))
        if len(header) < _BLOCK or not _checksum_matches(header):
            raise DataError(_not_a_tar(path, header) if offset == 0 else f"shard {path} is damaged at byte {offset}")
        kind, size = header[156:157], _number(header[124:136])
        data = offset + _BLOCK
        offset = data + -(-size // _BLOCK) * _BLOCK
        if data + size > end_of_file:
            raise DataError(_cut_short(path, end_of_file, f"a member needs {data + size} bytes"))
        if kind == b"L":  # GNU: the next member's name
            long_name = _text(os.pread(descriptor, size, data))
        elif kind == b"x":  # POSIX: attributes of the next member
            long_name = _pax_path(os.pread(descriptor, size, data)) or long_name
        elif kind in (b"0", b"\0"):
            yield Member(long_name or _name(header), data, size)
            long_name = None
        elif kind != b"g":
            long_name = None  # a folder, link or device: carries no sample


def _check_end(descriptor: int, path: str, offset: int, end_of_file: int) -> None:
    """Archives end in two blocks of zeros, and are filled up with zeros to 10 KiB or so."""
    rest = os.pread(descriptor, _MOST_FILLING, offset)
    if any(rest):
        raise DataError(f"shard {path} goes on after its archive's end at byte {offset}; two tars in one are not read")
    if offset + len(rest) < end_of_file:
        raise DataError(f"shard {path} holds nothing but zeros from byte {offset} on: copy it again")


def _checksum_matches(header: bytes) -> bool:
    try:
        return sum(header) - sum(header[148:156]) + 8 * ord(" ") == _number(header[148:156])
    except ValueError:
        return False


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base-256, for members of 8 GiB and more
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    return int(field.rstrip(b"\0 ") or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _pax_path(records: bytes) -> str | None:
    while records:
        length = int(records.split(b" ", 1)[0])
        key, _, value = records[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        records = records[length:]
    return None


def _cut_short(path: str, size: int, why: str) -> str:
    return f"shard {path} is cut short at {size} bytes ({why}): copy it again"


def _not_a_tar(path: str, header: bytes) -> str:
    if header[:2] == b"\x1f\x8b" or header[:4] == b"\x28\xb5\x2f\xfd" or header[:3] == b"BZh":
        return f"shard {path} is compressed; shards are read by position, so unpack it to a plain tar"
    return f"shard {path} is not a tar file"
