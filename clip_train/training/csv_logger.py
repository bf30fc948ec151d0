"""metrics.csv: appended row by row, so that a kill loses nothing and a resumed run goes on in the same file."""

import csv
import io
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from clip_train.data.files import write_atomic

_KEY_COLUMNS = ["step", "samples_seen"]


class CsvLogger(Logger):
    """Writes every row at once. Lightning's own CSV logger keeps rows in memory and deletes the file on resume.

    Args:
        save_dir: the run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """The run folder's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if not self._columns and self.path.exists():
            self._columns = list(read_metrics(self.path)[0])
        new = [name for name in row if name not in self._columns]
        if new:
            self._add_columns(new)
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def forget_after(self, samples_seen: int) -> None:
        """Drop the rows of steps that a resumed run will take again."""
        if self.path.exists():
            columns, rows = read_metrics(self.path)
            self._write(columns, [row for row in rows if int(row["samples_seen"]) <= samples_seen])

    def _add_columns(self, names: list[str]) -> None:
        rows = read_metrics(self.path)[1] if self.path.exists() else []
        self._columns = _KEY_COLUMNS + [name for name in self._columns + names if name not in _KEY_COLUMNS]
        self._write(self._columns, rows)

    def _write(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, text.getvalue().encode())


def read_metrics(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a metrics.csv; a value that a row does not have is an empty string."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if row["samples_seen"]]  # a kill may cut the last row
        return list(reader.fieldnames or []), rows
