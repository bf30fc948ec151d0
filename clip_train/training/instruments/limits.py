"""What limits a run, data, launching, computing or communication, and which setting to try."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from clip_train.training.instruments.step_times import COMMUNICATION, DATA, PARTS

LAUNCH, COMPUTE = "launch", "compute"
_WAITING = 0.1  # of a step, for data or other ranks, that is too much
_BESIDE = 0.25  # of a step, in none of its parts, that is too much
_CLOSE_BEHIND = 0.05  # of a step: a device that is no further behind the host waits for it
_FIRST_STEPS = 20
_SECONDS_BETWEEN_LINES = 600


@dataclass(frozen=True)
class Settings:
    """What of a run's config decides its speed.

    Attributes:
        precision: `trainer.precision`; `bf16` is whether the device multiplies in it.
        compiled: `trainer.compile`; None where it does not pay.
        recomputes: whole blocks are, in backward.
        encodes_twice: the local batch goes through in micro-batches.
        strategy: `ddp` or `fsdp`.
        exchange: `loss.exchange`, if the loss has it.
    """

    precision: str
    bf16: bool
    compiled: bool | None
    recomputes: bool
    encodes_twice: bool
    strategy: str
    exchange: str | None


def limit_of(parts: Mapping[str, float], step: float, lag: float | None) -> str:
    """Which of `data`, `communication`, `launch` and `compute` a step's time is lost to.

    Args:
        parts: seconds of each of `PARTS` in a step.
        step: seconds that it took.
        lag: seconds that the device was behind the host when backward had been launched; None where they are one.
    """
    waiting = max((DATA, COMMUNICATION), key=lambda part: parts[part])
    if parts[waiting] > _WAITING * step:
        return waiting
    if lag is not None and lag < _CLOSE_BEHIND * step:
        return LAUNCH
    return LAUNCH if sum(parts.values()) < (1 - _BESIDE) * step else COMPUTE


def remedy(limit: str, settings: Settings, loader: str | None) -> str:
    """Which setting to try.

    Args:
        loader: which stage of it is slow and what to change, if it is known.
    """
    if limit == DATA:
        return loader or "raise data.num_workers"
    if limit == LAUNCH:
        if settings.encodes_twice:
            return "a larger micro_batch_size, for fewer and larger operations"
        return "trainer.compile=true" if settings.compiled is False else "a larger batch_size per process"
    if limit == COMMUNICATION:
        return _remedy_of_communication(settings)
    return _remedy_of_compute(settings)


def _remedy_of_communication(settings: Settings) -> str:
    if settings.exchange == "ring":
        return "loss.exchange=gather, which sends less, if its memory suffices"
    if settings.strategy == "fsdp":
        return "trainer.strategy=ddp, which does not send weights, if the model fits"
    return "a larger batch_size, as its gradients are no more; or see whether a rank or the network is slow"


def _remedy_of_compute(settings: Settings) -> str:
    if settings.precision == "32" and settings.bf16:
        return "trainer.precision=bf16-mixed"
    if settings.recomputes:
        return "model.grad_checkpointing=none, if memory suffices: blocks are computed twice"
    if settings.compiled is False:
        return "trainer.compile=true"
    if settings.encodes_twice:
        return "a larger micro_batch_size, if memory suffices: all but the last micro-batch are encoded twice"
    if settings.strategy == "fsdp":
        return "trainer.strategy=ddp, if the model fits: waiting for weights is in forward and backward"
    return "nothing but more devices: they are at work"


class LimitLine:
    """Says in a line what limits the run: after its first steps, and later if that has changed, or is data still.

    Args:
        settings: of the run.
        now: seconds on some clock.
    """

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        self.settings, self._now = settings, now
        self._next = 0.0
        self._said: str | None = None

    def line(
        self,
        steps: int,
        parts: Mapping[str, float],
        step: float,
        lag: float | None,
        loader: str | None,
        last: bool = False,
    ) -> str | None:
        """What to log, if anything.

        Args:
            steps: timed since the run was started or resumed.
            parts, step, lag: as of `limit_of`.
            loader: as of `remedy`.
            last: there will be no other time to say it.
        """
        too_soon = self._said is not None and (last or self._now() < self._next)
        if too_soon or (steps < _FIRST_STEPS and not last):
            return None
        limit = limit_of(parts, step, lag)
        if limit == self._said and limit != DATA:
            return None
        self._said, self._next = limit, self._now() + _SECONDS_BETWEEN_LINES
        shares = ", ".join(f"{parts[part] / step:.0%} {part}" for part in PARTS)
        beside = max(1 - sum(parts.values()) / step, 0.0)
        return (
            f"limited by {limit}; to try: {remedy(limit, self.settings, loader)}"
            f" (a step of {1e3 * step:,.0f} ms: {shares}, {beside:.0%} beside)"
        )
