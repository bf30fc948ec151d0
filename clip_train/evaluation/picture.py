"""retrieval.png: what the model finds, for people to look at."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from clip_train.data.eval_batches import EvalBatches
from clip_train.data.files import whole_file
from clip_train.evaluation.features import Features

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_QUERIES = 8
_NEAREST = 5
_RIGHT, _WRONG = "#1a7f37", "#57606a"


def draw_retrieval(path: Path, title: str, batches: EvalBatches, features: Features) -> None:
    """Query pictures beside their five nearest names, query names beside their five nearest pictures.

    The queries are spread evenly over the set; right answers are green and ticked.
    """
    count = len(batches)
    queries = [int(i) for i in np.linspace(0, count - 1, min(_QUERIES, count))]
    nearest = min(_NEAREST, count)
    chosen = features.image[queries] @ features.text.T, features.text[queries] @ features.image.T
    to_text, to_image = (scores.topk(nearest).indices.tolist() for scores in chosen)
    figure, axes = plt.subplots(
        *(len(queries), 3 + nearest),
        figsize=(13, 1.45 * len(queries) + 0.8),
        squeeze=False,
        width_ratios=[1, 2.6, 1.7, *[1] * nearest],
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, query, names, pictures in zip(axes, queries, to_text, to_image, strict=True):
        picture, caption = batches.picture_and_caption(query)
        row[0].imshow(picture)
        _list_names(row[1], [batches.picture_and_caption(i)[1] for i in names], names, query)
        row[2].text(0.95, 0.5, _shorten(caption, 20), ha="right", va="center", fontsize=10, transform=row[2].transAxes)
        for axis, index in zip(row[3:], pictures):
            _show_answer(axis, batches.picture_and_caption(index)[0], index == query)
    figure.suptitle(title, fontsize=12)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    headings = {0: "picture", 1: f"its {nearest} nearest names", 2: "name", 3: f"its {nearest} nearest pictures"}
    for column, heading in headings.items():
        left, top = axes[0][column].get_position().x0, axes[0][1].get_position().y1
        figure.text(left, top + 0.015, heading, fontsize=11, weight="bold")
    try:
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=100)
    finally:
        plt.close(figure)


def _list_names(axis, names: Sequence[str], indices: Sequence[int], query: int) -> None:
    for line, (name, index) in enumerate(zip(names, indices, strict=True)):
        right = index == query
        text = f"{'✓' if right else ' '} {_shorten(name, 30)}"
        weight, color = ("bold", _RIGHT) if right else ("normal", _WRONG)
        axis.text(
            0, 0.9 - 0.19 * line, text, fontsize=9, color=color, weight=weight, va="center", transform=axis.transAxes
        )


def _show_answer(axis, picture: np.ndarray, right: bool) -> None:
    axis.imshow(picture)
    if right:
        height, width = picture.shape[:2]
        axis.add_patch(plt.Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor=_RIGHT, linewidth=4))
        axis.set_title("✓", fontsize=11, color=_RIGHT, weight="bold", pad=2)


def _shorten(text: str, length: int) -> str:
    text = " ".join(text.split()).replace("$", r"\$")  # a dollar would start matplotlib's mathematics
    return text if len(text) <= length else text[: length - 1] + "…"
