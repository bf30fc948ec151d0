"""What is wrong with a sample or a shard, and the list of all of it."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from clip_train.data.files import write_atomic
from clip_train.errors import DataError


class Damage(NamedTuple):
    """One thing that cannot be used.

    Attributes:
        kind: a short name that many have in common.
        place: the shard, or the file of a picture.
        key: the sample; empty if the whole shard is meant.
        detail: what exactly went wrong.
    """

    kind: str
    place: str
    key: str
    detail: str


def write_damages(path: str | Path, damages: Iterable[Damage]) -> None:
    """All of them as CSV. Raises DataError if the file cannot be written."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Damage._fields)
    writer.writerows(damages)
    try:
        write_atomic(path, text.getvalue().encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


def read_damages(path: str | Path) -> list[Damage]:
    """What `write_damages` wrote; nothing if there is no such file."""
    if not Path(path).exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [Damage(*row) for row in list(csv.reader(file))[1:]]
