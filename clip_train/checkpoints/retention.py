"""Which checkpoints stay: the newest, milestones, the best by a metric."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Saved:
    """What decides about a checkpoint: what was measured at its moment, and whether it stays for good."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    milestone: bool = False


@dataclass(frozen=True)
class Retention:
    """What is kept, besides milestones.

    Attributes:
        newest: how many of the newest.
        best: how many of the best.
        metric: by which they are judged, such as `val/coco/image_to_text_recall@1`; None for no best.
        mode: `max` or `min`.
    """

    newest: int
    best: int = 1
    metric: str | None = None
    mode: str = "max"

    def kept(self, checkpoints: Mapping[int, Saved]) -> set[int]:
        """The samples seen of those that stay."""
        milestones = {samples_seen for samples_seen, saved in checkpoints.items() if saved.milestone}
        return {*sorted(checkpoints)[-self.newest :], *milestones, *self._best(checkpoints)}

    def is_best(self, metrics: Mapping[str, float], others: Mapping[int, Saved]) -> bool:
        """Whether a checkpoint with these metrics would be among the best."""
        newest = max(others, default=0) + 1
        return newest in self._best({**others, newest: Saved(metrics)})

    def is_top(self, samples_seen: int, checkpoints: Mapping[int, Saved]) -> bool:
        """Whether this one is the best of all."""
        return self._best(checkpoints)[-1:] == [samples_seen]

    def _best(self, checkpoints: Mapping[int, Saved]) -> list[int]:
        """The best, the very best last; of equals the older."""
        if self.metric is None:
            return []
        sign = 1 if self.mode == "max" else -1
        ranked = {
            samples_seen: (sign * saved.metrics[self.metric], -samples_seen)
            for samples_seen, saved in checkpoints.items()
            if self.metric in saved.metrics
        }
        return sorted(ranked, key=ranked.__getitem__)[-self.best :]
