"""CSV files of a run that grow by rows, and lose the rows of steps that a resumed run takes again."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from clip_train.data.files import write_atomic


def append_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Append rows; the first call writes the header. The first column is `samples_seen`."""
    if not rows:
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    if not _has_header(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.writerow(columns)
    writer.writerows(rows)
    with open(path, "a", newline="", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text.getvalue())


def read_rows(path: Path) -> list[list[str]]:
    """All whole rows below the header; a kill may have cut the last."""
    with open(path, newline="", encoding="utf-8") as file:
        columns, *rows = csv.reader(file)
    return [row for row in rows if len(row) == len(columns)]


def drop_rows_after(path: Path, samples_seen: int) -> None:
    """Drop the rows of steps that end after `samples_seen`."""
    if not _has_header(path):
        return
    with open(path, newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file))
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *(row for row in read_rows(path) if int(row[0]) <= samples_seen)])
    write_atomic(path, text.getvalue().encode())


def _has_header(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
