"""What W&B has kept of a run on this disk: its `.wandb` files, as `wandb sync` reads them.

wandb no longer has a reader of its own in Python. A file is a LevelDB log of protobuf records.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

_FILE_HEADER = b":W&B\xe1\xbe\x00"  # name, magic number, version 0
_BLOCK = 32768
_RECORD_HEADER = 7  # crc32 (4 bytes), length (2), type (1)
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def wandb_files(run_folder: Path, run_id: str) -> list[Path]:
    """The files of a run's parts, oldest first: offline and online ones."""
    paths = (run_folder / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb")
    return sorted(paths, key=lambda path: path.parent.name.removeprefix("offline-"))


def waits_for_sync(path: Path) -> bool:
    """Whether this part was kept offline and has not been uploaded yet."""
    return path.parent.name.startswith("offline-") and not path.with_name(path.name + ".synced").exists()


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file up to its end, or to where a kill has cut it.

    Raises:
        ValueError: wandb has changed its format.
    """
    data = path.read_bytes()
    if len(data) < len(_FILE_HEADER):
        return
    if data[: len(_FILE_HEADER)] != _FILE_HEADER:
        raise ValueError(f"{path} is not in the format of wandb 0.31")
    place, content = len(_FILE_HEADER), b""
    while True:
        if _BLOCK - place % _BLOCK < _RECORD_HEADER:  # the rest of a block that no header fits into
            place += _BLOCK - place % _BLOCK
        header = data[place : place + _RECORD_HEADER]
        checksum, length, kind = header[:4], int.from_bytes(header[4:6], "little"), header[6:]
        place += _RECORD_HEADER
        part = data[place : place + length]
        if not kind or int.from_bytes(checksum, "little") != zlib.crc32(kind + part):
            return
        place += length
        content = part if kind[0] in (_FULL, _FIRST) else content + part
        if kind[0] in (_FULL, _LAST):
            yield Record.FromString(content)


def logged_steps(path: Path) -> list[int]:
    """The steps of the rows in a file, in order."""
    return [record.history.step.num for record in read_records(path) if record.HasField("history")]


def last_step(paths: list[Path]) -> int:
    """The last step that is in any of a run's files, given oldest first; -1 for none."""
    return next((steps[-1] for path in reversed(paths) if (steps := logged_steps(path))), -1)
