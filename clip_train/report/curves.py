"""Curves of a run's metrics as SVG."""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter

_MOST_POINTS = 1000


@dataclass(frozen=True)
class Chart:
    """A title, and which metrics it shows: those whose whole name the pattern fits."""

    title: str
    pattern: str


_CHARTS = (
    Chart("Training loss", r"train/(.*_)?loss"),
    Chart("Validation loss", r"val/.+/loss"),
    Chart("Accuracy on the batch", r"train/top1"),
    Chart("Recall", r"val/.+recall@\d+"),
    Chart("Zero-shot accuracy", r"zero_shot/.+/(top1|top5)"),
    Chart("Learning rate", r"train/lr"),
    Chart("Inverse temperature", r"train/logit_scale"),
    Chart("Gradient norm", r"train/grad_norm"),
    Chart("Samples per second", r"train/samples_per_second"),
    Chart("Share of time that waits for data", r"train/data_wait_fraction"),
    Chart("Milliseconds of a step", r"train/time/.+_ms"),
    Chart("Model FLOPs utilisation", r"train/mfu"),
)


def draw_curves(columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> list[tuple[str, str]]:
    """A chart of each kind that the metrics have: its title, and an `<svg>` element.

    Args:
        columns, rows: as `read_metrics` returns them.
    """
    table = list(rows)
    seen = _numbers(table, "samples_seen")
    found = []
    for chart in _CHARTS:
        lines = {}
        for column in columns:
            if re.fullmatch(chart.pattern, column):
                values = _numbers(table, column)
                there = np.isfinite(values) & np.isfinite(seen)
                if there.any():
                    lines[_label(column)] = (seen[there], values[there])
        if lines:
            found.append((chart.title, _draw(chart.title, lines)))
    return found


def _label(column: str) -> str:
    """A metric's name without what all names of its chart share."""
    return re.sub(r"^(train|val|zero_shot)/", "", column)


def _numbers(rows: Sequence[Mapping[str, str]], column: str) -> np.ndarray:
    return np.array([_number(row.get(column, "")) for row in rows], dtype=float)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _draw(title: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9}):
        figure, axis = plt.subplots(figsize=(5.2, 2.9))
        try:
            for name, (x, y) in lines.items():
                x, y = _thinned(x), _thinned(y)
                axis.plot(x, y, label=name, linewidth=1.3, marker="o" if len(x) < 20 else None, markersize=3)
            axis.set_xlabel("samples seen")
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if len(lines) > 1:
                columns = 1 + (len(lines) > 3)
                axis.legend(fontsize=7, frameon=False, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.22))
            return _svg(figure)
        finally:
            plt.close(figure)


def _thinned(values: np.ndarray) -> np.ndarray:
    """No more than so many points: each the mean of a stretch."""
    if len(values) <= _MOST_POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, _MOST_POINTS)])


def _svg(figure) -> str:
    """The element alone, which fits the width it is given."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    element = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", element, count=1, flags=re.S)
