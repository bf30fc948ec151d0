"""metrics.csv: appended row by row, so that a kill loses nothing and a resumed run goes on in the same file."""

from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from clip_train.data.files import write_atomic
from clip_train.training.loggers.patient_writer import PatientWriter, append_whole
from clip_train.training.loggers.rows import csv_text, drop_rows_after, whole_rows
from clip_train.training.loggers.run_logger import RunLogger

_KEY_COLUMNS = ["step", "samples_seen"]

Row = dict[str, float | None]


class CsvLogger(RunLogger):
    """Writes every row at once. Lightning's own CSV logger keeps rows in memory and deletes the file on resume.

    Args:
        save_dir: the run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir)
        self.path = self.folder / "metrics.csv"
        self._columns: list[str] = []
        self._writer: PatientWriter[Row] = PatientWriter(self.path, self._append)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._writer.add([{"step": step, **metrics}])

    @rank_zero_only
    def resume_after(self, step: int, samples_seen: int) -> None:
        drop_rows_after(self.path, samples_seen)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._writer.close()

    def _append(self, rows: list[Row]) -> None:
        old_columns, old_rows = self._columns, []
        if not old_columns and self.path.exists():
            old_columns, old_rows = read_metrics(self.path)
        names = dict.fromkeys([*old_columns, *_KEY_COLUMNS, *(name for row in rows for name in row)])
        columns = [*_KEY_COLUMNS, *(name for name in names if name not in _KEY_COLUMNS)]
        values = [[row.get(name, "") for name in columns] for row in rows]
        if columns == old_columns:
            append_whole(self.path, csv_text(values))
        else:
            old_rows = old_rows or (read_metrics(self.path)[1] if self.path.exists() else [])
            old_values = [[row.get(name, "") for name in columns] for row in old_rows]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, csv_text([columns, *old_values, *values]))
        self._columns = columns


def read_metrics(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a metrics.csv; a value that a row does not have is an empty string."""
    rows = [row for row, _ in whole_rows(Path(path))]
    columns = rows[0] if rows else []
    return columns, [dict(zip(columns, row, strict=True)) for row in rows[1:]]
