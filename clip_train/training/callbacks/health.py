"""Warnings of what is odd but finite, each said once as it begins: a loss that jumps, a temperature that runs away."""

import logging
import statistics
from collections import deque
from collections.abc import Mapping

log = logging.getLogger(__name__)

_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_LEAST_DEVIATION = 0.01  # as a share of the median: a loss that hardly moves must not make every step a spike


class Health:
    """Looks at the metrics of every finite step.

    Args:
        spike_window: steps whose median the loss is compared with; there is no warning in the first half of them.
        spike_deviations: how many robust standard deviations above that a spike is; None for no warning.
        scale_steps: steps for which the logit scale may stay at its limit without a warning; None for no warning.
        least_scale: a logit scale that falls below is a warning; None for none.
    """

    def __init__(
        self, *, spike_window: int, spike_deviations: float | None, scale_steps: int | None, least_scale: float | None
    ) -> None:
        self.spike_deviations, self.scale_steps, self.least_scale = spike_deviations, scale_steps, least_scale
        self._losses: deque[float] = deque(maxlen=spike_window)
        self._in_spike = False
        self._steps_at_max = 0
        self._was_above = False

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Look at a step, and say what is odd."""
        for warning in (self.spike(metrics["train/loss"]), self.odd_scale(metrics["train/logit_scale"])):
            if warning:
                log.warning("step %d: %s", step, warning)

    def spike(self, loss: float) -> str | None:
        """A warning at the first step of a spike; it lasts until the loss is half as far above the median."""
        if self.spike_deviations is None:
            return None
        warning = None
        if 2 * len(self._losses) >= (self._losses.maxlen or 0):
            median = statistics.median(self._losses)
            spread = statistics.median(abs(value - median) for value in self._losses)
            deviation = max(_MAD_TO_DEVIATION * spread, _LEAST_DEVIATION * abs(median))
            above = loss - median
            if above > self.spike_deviations * deviation and not self._in_spike:
                self._in_spike = True
                warning = (
                    f"the loss jumps to {loss:.4g}, {above / max(deviation, 1e-12):.0f} deviations above its median of"
                    f" {median:.4g} over {len(self._losses)} steps"
                )
            elif above < self.spike_deviations * deviation / 2:
                self._in_spike = False
        self._losses.append(loss)
        return warning

    def odd_scale(self, scale: float) -> str | None:
        """A warning when the scale has been at its limit for long, or falls below its least value."""
        return self._stuck(scale) or self._fallen(scale)

    def _stuck(self, scale: float) -> str | None:
        self._steps_at_max = self._steps_at_max + 1 if scale >= 100 * (1 - 1e-4) else 0
        if self._steps_at_max != self.scale_steps:
            return None
        return (
            f"train/logit_scale has been at its limit of 100 for {self.scale_steps} steps; late in a long run that is"
            " usual, early in one the learning rate is too high or captions repeat"
        )

    def _fallen(self, scale: float) -> str | None:
        if self.least_scale is None or scale >= self.least_scale:
            self._was_above = True
            return None
        if not self._was_above:
            return None  # it began there
        self._was_above = False
        return (
            f"train/logit_scale has fallen to {scale:.3g}, below {self.least_scale:g}: the features are collapsing, or"
            " images and captions do not belong together"
        )
