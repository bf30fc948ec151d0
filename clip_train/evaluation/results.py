"""What an evaluation found: a table for people, and files as clip-benchmark writes them."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clip_train.data.files import utf8, write_atomic
from clip_train.errors import DataError


@dataclass(frozen=True)
class Results:
    """The metrics of one set.

    Attributes:
        dataset: its name.
        task: clip-benchmark's name of what was done: `zeroshot_classification`, `zeroshot_retrieval`, `linear_probe`.
        metrics: by clip-benchmark's names where it has them: `acc1`, `acc5`, `mean_per_class_recall`,
            `image_retrieval_recall@5`. Shares are between 0 and 1.
        variants: metrics of the same set under other conditions, by what these are; a row each in table and CSV.
        language: of the texts.
    """

    dataset: str
    task: str
    metrics: Mapping[str, float]
    variants: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    language: str = "en"


@contextmanager
def writing_into(folder: Path) -> Iterator[Path]:
    """For whatever is written into the output folder.

    Raises:
        DataError: it cannot be written.
    """
    try:
        yield folder
    except OSError as error:
        raise DataError(f"output={folder} cannot be written: {error.strerror or error}") from error


def write_results(results: Results, folder: Path, model: str, pretrained: str) -> None:
    """Write `results.json`, which `clip_benchmark build` reads, and `results.csv`, which is what it makes of that.

    Args:
        folder: must be there.
        model, pretrained: the model's name, and where its weights are from.
    """
    about = {
        "dataset": results.dataset,
        "model": model,
        "pretrained": pretrained,
        "task": results.task,
        "language": results.language,
    }
    content = {**about, "metrics": dict(results.metrics)}
    write_atomic(folder / "results.json", (json.dumps(content, indent=2) + "\n").encode())
    about["model_fullname"] = f"{model} {pretrained}"
    rows: list[dict[str, Any]] = [{**about, **results.metrics}]
    rows += [{**about, "variant": name, **metrics} for name, metrics in results.variants.items()]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(folder / "results.csv", utf8(text.getvalue()))


def print_results(results: Results, console: Console) -> None:
    """The metrics as a table; with variants, a row for each and a column for each of their metrics, or, where there are
    more metrics than variants, the other way round."""
    title = f"{results.task} on {results.dataset}"
    variants = (
        {results.dataset: results.metrics, **results.variants} if results.variants else {"value": results.metrics}
    )
    names = list(dict.fromkeys(name for metrics in variants.values() for name in metrics))
    cells = {
        (variant, name): _readable(metrics[name]) if name in metrics else ""
        for variant, metrics in variants.items()
        for name in names
    }
    if len(names) > len(variants):
        table = Table("metric", title=title)
        columns, rows = list(variants), {name: [cells[variant, name] for variant in variants] for name in names}
    else:
        table = Table("", title=title)
        columns, rows = names, {variant: [cells[variant, name] for name in names] for variant in variants}
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)


def _readable(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
