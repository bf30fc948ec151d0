"""What a classifier confuses, and how sure it is, as pictures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from clip_train.data.files import whole_file
from clip_train.evaluation.calibration import Calibration

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_MOST_NAMES = 100  # along an axis: more could not be read
_MOST_NUMBERS = 20
_RIGHT, _GAP = "#0969da", "#cf222e"


def draw_confusion(path: Path, confusion: np.ndarray, names: Sequence[str], title: str) -> None:
    """A square of classes: the share of each row's pictures that was taken for the class of the column.

    Args:
        confusion: (classes, classes) numbers of pictures, rows by their own class, columns by what was said.
        names: of the classes.
    """
    size = len(names)
    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(min=1)
    side = min(16.0, 4 + 0.22 * min(size, _MOST_NAMES))
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the pictures of a class", shrink=0.8)
    axes.set(title=_plain(title), xlabel="predicted", ylabel="class")
    if size <= _MOST_NAMES:
        fontsize = 9 if size <= 30 else 6
        axes.set_xticks(range(size), [_plain(name) for name in names], rotation=90, fontsize=fontsize)
        axes.set_yticks(range(size), [_plain(name) for name in names], fontsize=fontsize)
    if size <= _MOST_NUMBERS:
        for row, column in np.argwhere(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            text = {"ha": "center", "va": "center", "fontsize": 7, "color": color}
            axes.text(column, row, f"{confusion[row, column]}", **text)
    _save(figure, path)


def draw_calibration(path: Path, calibration: Calibration, name: str) -> None:
    """A reliability diagram: accuracy by confidence, and below it how many pictures had that confidence."""
    bins = len(calibration.count)
    centers = (np.arange(bins) + 0.5) / bins
    seen = calibration.count.numpy() > 0
    accuracy, confidence = calibration.accuracy.numpy(), calibration.confidence.numpy()
    figure, (above, below) = plt.subplots(
        *(2, 1), figsize=(5, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    above.bar(centers[seen], accuracy[seen], 0.9 / bins, color=_RIGHT, label="accuracy")
    above.plot(confidence[seen], accuracy[seen], "o", color=_GAP, markersize=3, label="at the mean confidence")
    above.plot([0, 1], [0, 1], "--", color="gray", label="calibrated")
    above.set(title=f"{_plain(name)}: expected calibration error {calibration.ece:.3f}", ylabel="accuracy", ylim=(0, 1))
    above.legend(loc="upper left", fontsize=8)
    below.bar(centers, calibration.count.numpy(), 0.9 / bins, color="gray")
    below.set(xlabel="confidence", ylabel="pictures", xlim=(0, 1))
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=110)
    finally:
        plt.close(figure)


def _plain(name: str) -> str:
    return name.replace("$", r"\$")  # a dollar would start matplotlib's mathematics
