"""How `loss.py` shows what it measured: Markdown tables and a plot."""

import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from loss_contenders import CONTENDERS, Contender, Sample, baseline
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HEADER = (
    "loss", "ranks", "B", "D", "dtype", "time s", "vs open_clip", "peak MB above inputs", "vs open_clip",
    "MB on wire per rank", "loss value",
)  # fmt: skip
SLICE_HEADER = (
    "loss, SLICE ONLY", "ranks", "B", "D", "dtype", "rows computed", "rows per rank", "peak MB above inputs",
    "tiles s", "rest s", "whole loss s, EXTRAPOLATED",
)  # fmt: skip
NOTES = """
Time is that of forward and backward on the slowest rank, one thread per rank; memory is the highest resident memory in
that time on the hungriest rank, above what was resident before, features included. Both are medians over rounds of
fresh processes; some 10 MB more or less is the allocator's doing. "vs open_clip" divides by `open_clip default` on one
rank and by `open_clip local_loss+gather_with_grad` on several, by `open_clip bf16 autocast` for bf16 and by `open_clip
siglip bidir` for the sigmoid loss, round by round, and is the median of the ratios: below 1 is faster, or smaller.
Bytes on the wire are what each rank sends if collectives are rings. A loss value is the mean over ranks.
"""
SLICE_NOTES = """
**Only a slice of each loss was computed**: every buffer had its real size, but tiles ended after the rows given, on
each rank. Memory is that of the whole loss. Its time is extrapolated: the tiles' time, in proportion, plus the rest.
"""


@dataclass
class Result:
    """What a contender did in one setting.

    Attributes:
        rounds: for each round the ranks' samples; none if it was not run.
        not_run: why.
    """

    contender: Contender
    ranks: int
    batch: int
    dim: int
    rounds: list[list[Sample]] = field(default_factory=list)
    not_run: str = ""

    @property
    def setting(self) -> tuple[int, int, int]:
        return self.ranks, self.dim, self.batch

    @property
    def seconds(self) -> list[float]:
        """Of each round, the slowest rank's."""
        return [max(sample.seconds for sample in samples) for samples in self.rounds]

    @property
    def peaks(self) -> list[float]:
        """Of each round, the hungriest rank's."""
        return [max(sample.peak for sample in samples) for samples in self.rounds]

    @property
    def wire(self) -> float:
        return max(sample.wire or 0 for samples in self.rounds for sample in samples)

    @property
    def loss(self) -> float:
        return statistics.mean(sample.loss for sample in self.rounds[0])


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The cells under HEADER."""
    found = {(result.contender.name, *result.setting): result for result in results}
    return [_row(result, found.get((baseline(result.contender, result.ranks), *result.setting))) for result in results]


def _row(result: Result, against: Result | None) -> list[str]:
    start = _first_cells(result)
    if not result.rounds:
        return [*start, result.not_run, *["–"] * (len(HEADER) - len(start) - 1)]
    return [
        *start,
        f"{statistics.median(result.seconds):.3f}",
        _ratio(result.seconds, against.seconds if against else []),
        f"{statistics.median(result.peaks) / 1e6:.1f}",
        _ratio(result.peaks, against.peaks if against else []),
        f"{result.wire / 1e6:.3f}",
        f"{result.loss:.6f}",
    ]


def _first_cells(result: Result) -> list[str]:
    contender = result.contender
    return [contender.name, str(result.ranks), str(result.batch), str(result.dim), contender.dtype]


def _ratio(own: Sequence[float], baseline: Sequence[float]) -> str:
    """The median of the rounds' ratios; a process that needed no memory that shows has none."""
    ratios = [mine / theirs for mine, theirs in zip(own, baseline) if theirs]
    return f"{statistics.median(ratios):.2f}" if ratios else "–"


def slice_rows(results: Iterable[Result], computed: int) -> list[list[str]]:
    """The cells under SLICE_HEADER."""
    cells = []
    for result in results:
        local = result.batch // result.ranks
        slowest = max(result.rounds[0], key=lambda sample: sample.tile_seconds)
        rest = slowest.seconds - slowest.tile_seconds
        whole = slowest.tile_seconds * local / min(computed, local) + rest
        peak = f"{result.peaks[0] / 1e6:.1f}"
        times = (f"{slowest.tile_seconds:.2f}", f"{rest:.2f}", f"{whole:.1f}")
        cells.append([*_first_cells(result), str(min(computed, local)), str(local), peak, *times])
    return cells


def plot(results: Sequence[Result]) -> bytes:
    """A PNG with time and memory over the batch, a row of panels for each number of ranks and each width."""
    kinds = sorted({(result.ranks, result.dim) for result in results})
    figure = Figure(figsize=(13, 4.6 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 2, squeeze=False)
    for (ranks, dim), (times, memory) in zip(kinds, panels, strict=True):
        shown = [result for result in results if (result.ranks, result.dim) == (ranks, dim) and result.rounds]
        title = f"{ranks} rank{'s' if ranks > 1 else ''}, D = {dim}"
        _panel(times, f"Time, {title}", "seconds, forward + backward", [(r, r.seconds) for r in shown])
        megabytes = [(r, [peak / 1e6 for peak in r.peaks]) for r in shown]
        _panel(memory, f"Memory, {title}", "peak MB above the inputs, per rank", megabytes)
    lines = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    handles = [lines[name] for name in CONTENDERS if name in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def _panel(axes: Axes, title: str, label: str, values: Sequence[tuple[Result, list[float]]]) -> None:
    """One line per contender; ours drawn through, others' dashed."""
    names = list(CONTENDERS)
    batches = sorted({result.batch for result, _ in values})
    for name in dict.fromkeys(result.contender.name for result, _ in values):
        points = sorted((r.batch, statistics.median(each)) for r, each in values if r.contender.name == name)
        ours = name.startswith("ours")
        axes.plot(
            *zip(*points),
            label=name,
            color=f"C{names.index(name) % 10}",
            linestyle="-" if ours else "--",
            marker="o" if ours else "sv^D"[names.index(name) % 4],
            linewidth=2 if ours else 1.2,
            markersize=5,
        )
    axes.set(title=title, xlabel="global batch B, pairs", ylabel=label, yscale="log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.grid(True, which="major", alpha=0.3)


def disagreements(results: Iterable[Result]) -> list[str]:
    """What is wrong with the values: all of one batch must agree, whatever computed them and on however many ranks."""
    references: dict[tuple, Result] = {}
    wrong = []
    # In fp32 first, which is what the others are compared with.
    for result in sorted((r for r in results if r.rounds), key=lambda r: r.contender.dtype != "fp32"):
        sigmoid = result.contender.family == "sigmoid"
        reference = references.setdefault((sigmoid, result.batch, result.dim), result)
        tolerance = 1e-5 if result.contender.dtype == reference.contender.dtype == "fp32" else 1e-3
        if not math.isclose(result.loss, reference.loss, rel_tol=tolerance):
            values = f"{result.loss:.7g}, {reference.contender.name} {reference.loss:.7g}"
            wrong.append(f"B={result.batch}, ranks={result.ranks}: {result.contender.name} gives {values}")
    return wrong
