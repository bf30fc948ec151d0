"""Lengths of training said in samples, steps, epochs or per cent; all become samples, the clock of a run."""

import math
import re
from dataclasses import dataclass

from clip_train.errors import ConfigError

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*([kMGB]?)")
_DURATION = re.compile(_NUMBER.pattern + r"\s*(samples?|steps?|epochs?|%|)")
_PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|sec|seconds?|m|min|minutes?|h|hours?|)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
RUN_LENGTH_KEYS = ("max_samples", "max_steps", "max_epochs")


@dataclass(frozen=True)
class Clock:
    """What turns a duration into samples.

    Attributes:
        batch_size: samples per step, over all ranks.
        epoch_samples: samples in the training set.
        total_samples: length of the run.
    """

    batch_size: int
    epoch_samples: int
    total_samples: int

    @classmethod
    def of_run(
        cls,
        batch_size: int,
        epoch_samples: int,
        max_samples: float | str | None = None,
        max_steps: float | str | None = None,
        max_epochs: float | str | None = None,
    ) -> "Clock":
        """The clock of a run whose length is given in exactly one way, as 20000 or 400M, and becomes whole steps.

        Raises:
            ConfigError: no length, two, or one that is not positive.
        """
        given = {
            name: value
            for name, value in zip(RUN_LENGTH_KEYS, (max_samples, max_steps, max_epochs))
            if value is not None
        }
        if len(given) != 1:
            said = " and ".join(f"{name}={value}" for name, value in given.items()) or "none is given"
            raise ConfigError(f"give exactly one of {', '.join(RUN_LENGTH_KEYS)} ({said})")
        ((name, value),) = given.items()
        match = _NUMBER.fullmatch(str(value))
        number = float(match[1]) * _PREFIXES[match[2]] if match else 0.0
        if number <= 0:
            raise ConfigError(f"{name}={value} is not a positive number")
        samples = number * {"max_samples": 1, "max_steps": batch_size, "max_epochs": epoch_samples}[name]
        return cls(batch_size, epoch_samples, math.ceil(samples / batch_size) * batch_size)

    def samples(self, duration: str | int | float, setting: str) -> int:
        """Samples in `2000 steps`, `10M samples`, `1 epoch` or `5%` of the run; a bare number is steps.

        Raises:
            ConfigError: `duration` is none of these; `setting` is the config key named in the message.
        """
        return round(self._exact_samples(duration, setting))

    def cadence(self, duration: str | int | float | None, setting: str) -> int | None:
        """Samples between two things that happen again and again, at least one step; None for never.

        Raises:
            ConfigError: `duration` is not one, as for `samples`, or is 0.
        """
        if duration is None:
            return None
        exact = self._exact_samples(duration, setting)
        if not exact:
            raise ConfigError(f"{setting}={duration} is no time between two steps; write null for never")
        return max(round(exact), self.batch_size)

    def _exact_samples(self, duration: str | int | float, setting: str) -> float:
        match = _DURATION.fullmatch(str(duration).strip())
        if not match:
            raise ConfigError(f"{setting}={duration!r} is no duration; write 2000 steps, 10M samples, 1 epoch or 5%")
        number = float(match[1]) * _PREFIXES[match[2]]
        unit = match[3].rstrip("s") or "step"
        per_unit = {
            "sample": 1,
            "step": self.batch_size,
            "epoch": self.epoch_samples,
            "%": self.total_samples / 100,
        }
        return number * per_unit[unit]


def seconds_of(duration: str | float, setting: str) -> float:
    """Seconds in `90 s`, `15 minutes` or `2 hours`; a bare number is seconds.

    Raises:
        ConfigError: `duration` is none of these; `setting` is the config key named in the message.
    """
    match = _TIME.fullmatch(str(duration).strip())
    seconds = float(match[1]) * _SECONDS[match[2][:1]] if match else 0.0
    if seconds <= 0:
        raise ConfigError(f"{setting}={duration} is no time; write 90 s, 15 minutes or 2 hours")
    return seconds


def passes(samples_seen: int, batch_size: int, every_samples: int | None) -> bool:
    """Whether the last step reached or passed a multiple of `every_samples`."""
    return bool(every_samples) and samples_seen // every_samples > (samples_seen - batch_size) // every_samples
