"""Which checkpoints stay: the newest, milestones, the best by a metric."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """What is kept.

    Attributes:
        newest: how many of the newest.
        is_milestone: whether what was saved at so many samples seen stays for good.
        best: how many of the best.
        metric: by which they are judged, such as `val/coco/image_to_text_recall@1`; None for no best.
        mode: `max` or `min`.
    """

    newest: int
    is_milestone: Callable[[int], bool] = lambda samples_seen: False
    best: int = 1
    metric: str | None = None
    mode: str = "max"

    def kept(self, checkpoints: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The samples seen of those that stay.

        Args:
            checkpoints: by samples seen, the metrics measured at that moment.
        """
        kept = set(sorted(checkpoints)[-self.newest :])
        kept |= {samples_seen for samples_seen in checkpoints if self.is_milestone(samples_seen)}
        return kept | set(self._best(checkpoints))

    def is_best(self, metrics: Mapping[str, float], others: Mapping[int, Mapping[str, float]]) -> bool:
        """Whether a checkpoint with these metrics would be among the best."""
        newest = max(others, default=0) + 1
        return newest in self._best({**others, newest: metrics})

    def is_top(self, samples_seen: int, checkpoints: Mapping[int, Mapping[str, float]]) -> bool:
        """Whether this one is the best of all."""
        return self._best(checkpoints)[-1:] == [samples_seen]

    def _best(self, checkpoints: Mapping[int, Mapping[str, float]]) -> list[int]:
        if self.metric is None:
            return []
        judged = [samples_seen for samples_seen, metrics in checkpoints.items() if self.metric in metrics]
        sign = 1 if self.mode == "max" else -1
        metric = self.metric
        return sorted(judged, key=lambda seen: (sign * checkpoints[seen][metric], -seen))[-self.best :]
