"""CSV files of a run that grow by whole rows, and lose the rows of steps that a resumed run takes again."""

import csv
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from clip_train.training.loggers.patient_writer import PatientWriter, append_whole

log = logging.getLogger(__name__)


class RowsFile:
    """A CSV file with a fixed header. A full disk does not end the run: the rows wait in memory.

    Args:
        path: the file; made with the first row.
        columns: the header; one of them is `samples_seen`, which never falls from row to row.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns
        self._writer: PatientWriter[Sequence[object]] = PatientWriter(path, self._append)

    def append(self, rows: Iterable[Sequence[object]]) -> None:
        """Append rows."""
        self._writer.add(list(rows))

    def _append(self, rows: list[Sequence[object]]) -> None:
        header = [] if self.path.exists() and self.path.stat().st_size else [self.columns]
        append_whole(self.path, csv_text([*header, *rows]))


def csv_text(rows: Iterable[Sequence[object]]) -> bytes:
    """Rows as they stand in a file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")


def read_rows(path: Path) -> list[list[str]]:
    """All whole rows below the header; a kill may have cut the last."""
    return [row for row, _ in whole_rows(path)][1:]


def drop_rows_after(path: Path, samples_seen: int) -> None:
    """Cut off the rows of steps that end after `samples_seen`, and a last row that a kill has cut.

    Nothing is written, so that it works on a full disk. A file that cannot be changed is left as it is: rows that come
    twice do less harm than one rank of a run that ends while the others wait for it.
    """
    try:
        if path.exists():
            _truncate(path, samples_seen)
    except OSError as error:
        log.error("CANNOT CHANGE %s: %s; it keeps the rows of steps that are taken again", path, error.strerror)


def _truncate(path: Path, samples_seen: int) -> None:
    rows = whole_rows(path)
    columns, kept = next(rows, (["samples_seen"], 0))
    place = list(columns).index("samples_seen")
    for row, end in rows:
        if int(row[place]) <= samples_seen:
            kept = end
    with open(path, "r+b") as file:
        file.truncate(kept)


def whole_rows(path: Path) -> Iterator[tuple[list[str], int]]:
    """The header, and the rows that have as many columns, each with the place in bytes where it ends."""
    end, complete = 0, False

    def lines() -> Iterator[str]:
        nonlocal end, complete
        for line in file:
            end, complete = end + len(line), line.endswith(b"\n")
            yield line.decode(errors="replace")

    with open(path, "rb") as file:
        columns = None
        for row in csv.reader(lines()):
            columns = columns or row
            if complete and len(row) == len(columns):
                yield row, end
