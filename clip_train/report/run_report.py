"""report.html: all of a run on one page that needs no network, so that it can be mailed."""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from clip_train.checkpoints.folder import InvalidCheckpointError, list_checkpoints, read_manifest
from clip_train.data.files import write_atomic
from clip_train.errors import DataError
from clip_train.report.curves import draw_curves
from clip_train.training.loggers.csv_logger import read_metrics
from clip_train.training.run_folder import RunFolder

_LARGEST_PICTURE = 8 << 20
_HEADLINES = (  # what stands at the top, if the run has it
    ("samples seen", "samples_seen"),
    ("steps", "steps"),
    ("samples per second", "samples_per_second"),
    ("processes", "world_size"),
    ("parameters", "parameters"),
)


@dataclass(frozen=True)
class Picture:
    """A picture of the run, under a title, as a `data:` address."""

    title: str
    address: str


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a set: at the end of training, or by clip-eval in a folder inside the run's."""

    title: str
    metrics: dict[str, str]
    pictures: list[Picture]


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run's folder, from what lies there.

    Args:
        folder: of a run that has begun. Folders of `clip-eval` inside it are shown, too.

    Returns:
        Where the report is.

    Raises:
        DataError: this is not the folder of a run, or it cannot be written to.
    """
    run = RunFolder(folder)
    if not run.config.exists():
        raise DataError(f"report={folder} is not the folder of a run: it has no {run.config.name}")
    page = _template().render(**_content(run))
    path = run.path / "report.html"
    try:
        write_atomic(path, page.encode())
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _content(run: RunFolder) -> dict[str, Any]:
    summary = run.read_summary() if run.summary.exists() else {}
    metrics = run.path / "metrics.csv"
    columns, rows = read_metrics(metrics) if metrics.exists() else ([], [])
    return {
        "name": run.path.resolve().name,
        "status": _status(summary),
        "headlines": [(label, _readable(summary[key])) for label, key in _HEADLINES if summary.get(key) is not None],
        "curves": draw_curves(columns, rows),
        "metrics": {name: _readable(value) for name, value in summary.get("metrics", {}).items()},
        "data": list(_data_rows(run)),
        "retrieval": _picture(run.path / "retrieval.png", "What the model finds"),
        "evaluations": [*_zero_shot(run.path, summary.get("metrics", {})), *_evaluations(run.path)],
        "environment": summary.get("environment", {}),
        "config": run.config.read_text(),
    }


def _status(summary: Mapping[str, Any]) -> str:
    if not summary:
        return "under way, or cut off"
    if summary.get("complete"):
        return "complete"
    return "pruned" if summary.get("pruned") else "stopped before its end"


def _data_rows(run: RunFolder) -> Iterator[tuple[str, str, str]]:
    """Each source of the training data: its name, shards and samples, as the newest checkpoint notes them."""
    for checkpoint in reversed(list_checkpoints(run.checkpoints)):
        try:
            description = read_manifest(checkpoint).about.get("data") or {}
        except InvalidCheckpointError:
            continue
        for source in description.get("sources", []):
            yield source["name"], _readable(source["shards"]), _readable(source["samples"])
        return


def _zero_shot(folder: Path, metrics: Mapping[str, float]) -> Iterator[Evaluation]:
    """The labelled sets of the end of training."""
    sets: dict[str, dict[str, str]] = {}
    for key, value in metrics.items():
        if key.startswith("zero_shot/"):
            name, metric = key.removeprefix("zero_shot/").rsplit("/", 1)
            sets.setdefault(name, {})[metric] = _readable(value)
    for name, found in sets.items():
        confusion = _picture(folder / f"confusion_{name}.png", "confusion matrix")
        yield Evaluation(f"zero-shot classification of {name}", found, [confusion] if confusion else [])


def _evaluations(folder: Path) -> Iterator[Evaluation]:
    for path in sorted(folder.rglob("results.json")):
        try:
            found = json.loads(path.read_text())
            metrics = {name: _readable(value) for name, value in found["metrics"].items()}
            title = f"{found['task']} on {found['dataset']}"
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # another program's file of that name
        pictures = [_picture(picture, picture.stem.replace("_", " ")) for picture in sorted(path.parent.glob("*.png"))]
        yield Evaluation(title, metrics, [picture for picture in pictures if picture])


def _picture(path: Path, title: str) -> Picture | None:
    if not path.exists() or path.stat().st_size > _LARGEST_PICTURE:
        return None
    return Picture(title, "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())


def _readable(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _template() -> jinja2.Template:
    source = files("clip_train") / "assets" / "report.html.j2"
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source.read_text())
