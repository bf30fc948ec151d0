"""How `loader.py` shows what it measured: Markdown tables."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loader_contenders import LOADERS, TOKENIZERS
from loader_shards import PictureSet
from record import markdown_table

from clip_train.data.loader_stages import STAGES

Sample = Mapping[str, float]

BASELINE, FLOOR = "open_clip", "decode only"
_HEADER = (
    "loader", "images/s", "lowest – highest", "ms per image", f"vs {BASELINE}", f"share of {FLOOR}", "processor's time",
)  # fmt: skip
_STAGES_HEADER = ("ms per image", *STAGES, "all")
_TOKENIZER_HEADER = ("tokenizer", "captions/s", "ids/s", f"vs {BASELINE}")
NOTES = f"""
All run in one process on one core: from shards in the page cache to batches of 64 crops of 224 x 224 with 77 token ids
each. A second is one of processor time (user and system) of the whole process, as other processes may want the same
core; the last column is its share of the time that passed. Figures are medians over rounds of fresh processes that run
whole passes over the set; "vs {BASELINE}" and "share of {FLOOR}" divide round by round, and are the medians of the
ratios.

- `ours` delivers bytes, which are normalised on the device; `{BASELINE}` normalised floats; the others floats.
- `{BASELINE}` is its own training pipeline (`get_wds_dataset`) with its shuffle buffers and `--workers 0`, so that all
  is done in the measured process, beside webdataset 0.2.86: with 1.x its reader fails.
- `{FLOOR}` is libjpeg-turbo alone (simplejpeg, set as in `ours`), on JPEGs in memory, at the smallest of
  1, 1/2, 1/4 and 1/8 of their size that leaves 224 pixels each way; `any eighths` at the smallest of all eighths.
- Tokenizers get 64 captions at once, and have met all words before.
"""


@dataclass
class Result:
    """What a contender did on one set.

    Attributes:
        rounds: of each round, samples, seconds and details; none if it was not run.
        not_run: why.
    """

    rounds: list[Sample] = field(default_factory=list)
    not_run: str = ""

    def rates(self, key: str = "samples") -> list[float]:
        """Per second of the processor, of each round."""
        return [sample[key] / sample["cpu_seconds"] for sample in self.rounds]

    def ms_per_image(self, stage: str = "seconds") -> float:
        """The processor's time for a stage of which the seconds that passed are known, or for all; the median."""
        return 1000 * statistics.median(
            sample[stage] / sample["seconds"] * sample["cpu_seconds"] / sample["samples"] for sample in self.rounds
        )

    def cpu_share(self) -> float:
        """Of the time that passed; the median."""
        return statistics.median(sample["cpu_seconds"] / sample["seconds"] for sample in self.rounds)


def report(pictures: PictureSet, results: Mapping[str, Result]) -> str:
    """The section on one set."""
    ran = {name: result for name, result in results.items() if result.rounds}
    tables = {
        _HEADER: [_loader_row(name, results) for name in LOADERS if name in results],
        _STAGES_HEADER: [_stage_row(name, ran[name]) for name in LOADERS if name in ran and name.startswith("ours")],
        _TOKENIZER_HEADER: [_tokenizer_row(name, ran) for name in TOKENIZERS if name in ran],
    }
    shown = [markdown_table(header, rows) for header, rows in tables.items() if rows]
    return "\n".join([f"## {pictures.folder.name}\n\n{pictures.about}\n", *shown])


def _loader_row(name: str, results: Mapping[str, Result]) -> list[str]:
    result = results[name]
    if not result.rounds:
        return [name, f"did not run: {result.not_run}", *["–"] * (len(_HEADER) - 2)]
    rates = result.rates()
    return [
        name,
        f"{statistics.median(rates):.0f}",
        f"{min(rates):.0f} – {max(rates):.0f}",
        f"{result.ms_per_image():.2f}",
        _ratio(rates, results.get(BASELINE)),
        _ratio(rates, results.get(FLOOR)),
        f"{result.cpu_share():.0%}",
    ]


def _stage_row(name: str, result: Result) -> list[str]:
    return [name, *(f"{result.ms_per_image(stage):.2f}" for stage in STAGES), f"{result.ms_per_image():.2f}"]


def _tokenizer_row(name: str, results: Mapping[str, Result]) -> list[str]:
    captions, ids = (results[name].rates(key) for key in ("samples", "ids"))
    medians = (f"{statistics.median(rates):,.0f}" for rates in (captions, ids))
    return [name, *medians, _ratio(captions, results.get("open_clip's tokenizer"))]


def _ratio(own: Sequence[float], other: Result | None) -> str:
    """The median of the rounds' ratios."""
    ratios = [mine / theirs for mine, theirs in zip(own, other.rates() if other else [])]
    return f"{statistics.median(ratios):.2f}" if ratios else "–"
