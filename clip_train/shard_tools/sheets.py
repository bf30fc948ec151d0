"""Pictures for people: a sheet of random samples with their captions, and histograms."""

import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from clip_train.data.captions import UnusableCaption
from clip_train.data.decoding import decode_rgb
from clip_train.data.files import utf8
from clip_train.shard_tools.samples import Selection, sample_tasks
from clip_train.shard_tools.stats import CONTEXT_LENGTH, Measurements, count_tokens

_COLUMNS, _ROWS = 6, 4
_CELL_INCHES, _CAPTION_INCHES = 2.2, 0.62
_TITLE_INCHES, _GAP = 0.45, 0.08
_DPI, _TILE_PIXELS = 110, 440
_LINE_LETTERS, _LINES = 32, 4
_BAR, _MARK, _INK, _FAINT = "#3b6ea5", "#c0392b", "#24292f", "#8c959f"
_BACKGROUND, _GRID = "#f0f2f5", "#eaeef2"
_BINS = 40


def draw_samples(path: Path, measured: Measurements, selection: Selection, title: str) -> None:
    """A grid of samples drawn at random, each with its first caption. One that cannot be used says so."""
    count = min(_COLUMNS * _ROWS, sum(index.num_samples for index in measured.indexes))
    drawn = Selection(selection.image_key, selection.caption_key, count, selection.seed)
    samples = [sample for task in sample_tasks(measured.indexes, drawn, measured.access) for sample in task.read()]
    width, row_height = _COLUMNS * _CELL_INCHES, _CELL_INCHES + _CAPTION_INCHES
    height = _TITLE_INCHES + -(-count // _COLUMNS) * row_height
    figure = Figure(figsize=(width, height), dpi=_DPI)
    figure.text(
        _GAP / width, 1 - _TITLE_INCHES / 2 / height, title, fontsize=12, weight="bold", color=_INK, va="center"
    )
    side = _CELL_INCHES - 2 * _GAP
    for number, sample in enumerate(samples):
        row, column = divmod(number, _COLUMNS)
        left, bottom = column * _CELL_INCHES + _GAP, height - _TITLE_INCHES - row * row_height - side
        axis = figure.add_axes((left / width, bottom / height, side / width, side / height))
        axis.axis("off")
        tile = Image.new("RGB", (_TILE_PIXELS, _TILE_PIXELS), _BACKGROUND)
        try:
            caption, color = selection.captions.first(sample.captions), _INK
            _paste_in_the_middle(tile, decode_rgb(sample.image or b""))
        except (OSError, UnusableCaption) as error:
            caption, color = f"{sample.key}: {error}", _MARK
        axis.imshow(np.asarray(tile))
        _write_below(axis, caption, color)
    _save(figure, path)


def draw_histograms(path: Path, measured: Measurements, title: str) -> None:
    """How captions and pictures are distributed over the samples that were measured."""
    pictures, captions = measured.pictures(), measured.captions()
    tokens = count_tokens(captions)
    figure = Figure(figsize=(13, 6.6), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=12, weight="bold", color=_INK, x=0.01, ha="left")
    axes = figure.subplots(2, 3).flat
    _bars(axes[0], tokens, "tokens of a caption", mark=(CONTEXT_LENGTH, 0.9, f"{CONTEXT_LENGTH} tokens"))
    _bars(axes[1], [len(caption.split()) for caption in captions], "words of a caption")
    _bars(axes[2], [index.num_samples for index in measured.indexes], "samples of a shard", of="shards")
    _bars(axes[3], [min(sample.width, sample.height) for sample in pictures], "shorter side of a picture, pixels")
    _bars(
        axes[4],
        [sample.width / sample.height for sample in pictures],
        "width / height of a picture",
        mark=(1, 0.9, "square"),
    )
    _bars(axes[5], [sample.image_bytes / 1000 for sample in pictures], "size of a picture, kB")
    _save(figure, path)


def _paste_in_the_middle(tile: Image.Image, picture: Image.Image) -> None:
    scale = min(tile.width / picture.width, tile.height / picture.height)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    tile.paste(resized, ((tile.width - width) // 2, (tile.height - height) // 2))


def _write_below(axis: Axes, caption: str, color: str) -> None:
    caption = utf8(caption).decode()  # fonts refuse halves of letters
    lines = textwrap.wrap(caption, _LINE_LETTERS, max_lines=_LINES, placeholder=" …")
    axis.annotate(
        "\n".join(lines),
        xy=(0.5, 0),
        xytext=(0, -4),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=8,
        color=color,
        parse_math=False,  # a dollar is a dollar
    )


def _bars(
    axis: Axes,
    values: Sequence[float] | np.ndarray,
    label: str,
    of: str = "",
    mark: tuple[float, float, str] | None = None,
) -> None:
    """A histogram up to the 99.5th percentile: one huge value must not squeeze all others into one bar."""
    axis.set_xlabel(label, color=_INK)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(colors=_FAINT, labelsize=8, left=False)
    axis.grid(axis="y", color=_GRID)
    axis.set_axisbelow(True)
    if len(values) == 0:
        axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", color=_FAINT)
        return
    array = np.asarray(values, dtype=float)
    median = float(np.median(array))
    if array.min() == array.max():
        axis.text(0.5, 0.5, f"all {median:,.4g}", transform=axis.transAxes, ha="center", color=_INK, fontsize=12)
        axis.set(xticks=[], yticks=[])
        return
    axis.hist(array, bins=_edges(array).tolist(), color=_BAR, edgecolor="white", linewidth=0.4)
    axis.margins(y=0.15)
    axis.set_ylabel(of, color=_FAINT, fontsize=8)
    _mark(axis, median, 1, f"median {median:,.4g}", _INK)
    if mark and axis.get_xlim()[0] < mark[0] < axis.get_xlim()[1]:
        _mark(axis, *mark, _MARK)


def _mark(axis: Axes, place: float, height: float, label: str, color: str) -> None:
    axis.axvline(place, color=color, linewidth=1)
    axis.annotate(f" {label}", (place, height), xycoords=("data", "axes fraction"), va="top", fontsize=8, color=color)


def _edges(values: np.ndarray) -> np.ndarray:
    """From the lowest to the 99.5th percentile; for a few whole numbers, as many of them to each bar."""
    low, high = float(values.min()), float(np.percentile(values, 99.5))
    if (values == values.round()).all() and high - low < 3 * _BINS:
        step = max(1, round((high - low) / _BINS))
        return np.arange(low - 0.5, high + step + 0.5, step)
    return np.linspace(low, high if high > low else values.max(), _BINS + 1)


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.png")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a letter the font lacks is drawn as a box
        FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path)
