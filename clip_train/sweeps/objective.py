"""What a sweep compares its trials by."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from clip_train.errors import ConfigError

Direction = Literal["maximize", "minimize"]
DIRECTIONS = get_args(Direction)
_TO_TEXT = re.compile(r"val/.+/image_to_text_recall@1")


@dataclass(frozen=True)
class Objective:
    """A metric of runs, or the mean of several.

    Attributes:
        metrics: names as in summary.json; None is recall@1 of the first validation set, the mean of both directions.
        direction: `maximize` or `minimize`.
    """

    metrics: tuple[str, ...] | None
    direction: Direction

    @classmethod
    def of(cls, metric: str | Sequence[str] | None, direction: str | None, has_validation: bool) -> "Objective":
        """The config's `metric` and `direction`; without a metric recall@1, or train/loss if nothing is validated.

        Raises:
            ConfigError: there is no such direction.
        """
        if metric is None and not has_validation:
            metric = "train/loss"
        metrics = None if metric is None else (metric,) if isinstance(metric, str) else tuple(metric)
        if direction is None:
            direction = "minimize" if metrics and metrics[0].endswith("loss") else "maximize"
        if direction not in DIRECTIONS:
            raise ConfigError(f"hydra.sweeper.direction={direction} is none of {', '.join(DIRECTIONS)}")
        return cls(metrics, cast(Direction, direction))

    @property
    def name(self) -> str:
        """For people."""
        return "recall@1 of the first validation set" if self.metrics is None else " and ".join(self.metrics)

    def value(self, metrics: Mapping[str, float]) -> float:
        """Of a run with these metrics.

        Raises:
            ConfigError: the run has no such metric.
        """
        names = self.metrics
        if names is None:
            to_text = next((name for name in metrics if _TO_TEXT.fullmatch(name)), "val/<set>/image_to_text_recall@1")
            names = (to_text, to_text.replace("image_to_text", "text_to_image"))
        for name in names:
            if name not in metrics:
                known = ", ".join(sorted(metrics))
                raise ConfigError(f"hydra.sweeper.metric={name}: no such metric; there are {known}")
        return sum(metrics[name] for name in names) / len(names)

    def best(self, values: Mapping[int, float]) -> int | None:
        """The key of the best value; of equal ones the first."""
        pick = max if self.direction == "maximize" else min
        return pick(sorted(values), key=lambda number: values[number], default=None)
