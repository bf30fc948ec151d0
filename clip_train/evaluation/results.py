"""What an evaluation found: a table for people, and files as clip-benchmark writes them."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clip_train.data.files import write_atomic


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


def write_results(results: Results, folder: Path, model: str, pretrained: str) -> None:
    """Write `results.json`, which `clip_benchmark build` reads, and `results.csv`, which is what it makes of that.

    Args:
        folder: is there.
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
    write_atomic(folder / "results.csv", text.getvalue().encode())


def print_results(results: Results, console: Console) -> None:
    """The metrics as a table; with variants, a row for each and a column for each of their metrics."""
    console.print(f"{results.task} on {results.dataset}", highlight=False)
    if not results.variants:
        table = Table("metric")
        table.add_column("value", justify="right")
        for name, value in results.metrics.items():
            table.add_row(name, _readable(value))
        console.print(table)
        return
    rows = {results.dataset: results.metrics, **results.variants}
    columns = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    table = Table("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, metrics in rows.items():
        table.add_row(name, *(_readable(metrics[column]) if column in metrics else "" for column in columns))
    console.print(table)


def _readable(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
