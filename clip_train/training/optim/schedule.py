"""The learning rate as a function of the samples seen: no state to save, none to lose."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from clip_train.errors import ConfigError
from clip_train.training.durations import Clock

# What the peak rate is multiplied by in the step that begins at so many samples seen.
Schedule = Callable[[int], float]

COSINE = MappingProxyType({"name": "cosine", "end_factor": 0.0})
COOLDOWN_SHAPES = ("power", "1-sqrt")
_DURATIONS = ("cooldown", "period", "timescale")


def make_schedule(settings: Mapping[str, Any], clock: Clock, warmup_samples: int) -> Schedule:
    """The schedule of the `schedule` group, after a linear warm-up.

    Raises:
        ConfigError: a setting is missing, unknown, or no duration.
    """
    name = settings["name"]
    given = {key: value for key, value in settings.items() if key != "name"}
    wanted = {key for key, p in inspect.signature(SHAPES[name]).parameters.items() if p.kind is p.KEYWORD_ONLY}
    if differing := sorted(given.keys() ^ wanted):
        has = "has no" if differing[0] in given else "needs"
        raise ConfigError(f"schedule.name={name} {has} {differing[0]}: choose its file, schedule={name}")
    for key in given.keys() & _DURATIONS:
        setting = f"schedule.{key}"
        given[key] = samples = clock.samples(given[key], setting)
        if not samples and key != "cooldown":
            raise ConfigError(f"{setting}={settings[key]} is no length of time")
    shape = partial(SHAPES[name], length=clock.total_samples - warmup_samples, **given)
    return partial(_after_warmup, shape=shape, batch_size=clock.batch_size, warmup_samples=warmup_samples)


def _after_warmup(samples_seen: int, *, shape: Callable[[int], float], batch_size: int, warmup_samples: int) -> float:
    """As in open_clip, the first step of the warm-up is not wasted on a rate of 0."""
    factor = shape(samples_seen - warmup_samples)
    return factor * min(1.0, (samples_seen + batch_size) / warmup_samples) if samples_seen < warmup_samples else factor


# Of each shape: `seen` are the samples since the end of the warm-up, negative during it; `length` those from there to
# the end of the run. All lengths are in samples.


def cosine(seen: float, length: float, *, end_factor: float) -> float:
    """Half a cosine from 1 to `end_factor`."""
    return end_factor + (1 - end_factor) * 0.5 * (1 + math.cos(math.pi * _progress(seen, length)))


def linear(seen: float, length: float, *, end_factor: float) -> float:
    """A straight line from 1 to `end_factor`."""
    return end_factor + (1 - end_factor) * (1 - _progress(seen, length))


def constant(
    seen: int, length: int, *, cooldown: int, cooldown_shape: str, cooldown_power: float, end_factor: float
) -> float:
    """1, until the cooldown."""
    return _cooled(seen, length, cooldown, cooldown_shape, cooldown_power, end_factor)


def rsqrt(
    seen: int,
    length: int,
    *,
    timescale: int,
    cooldown: int,
    cooldown_shape: str,
    cooldown_power: float,
    end_factor: float,
) -> float:
    """One by the square root of 1 + seen / timescale, times the cooldown."""
    factor = (1 + max(0, seen) / timescale) ** -0.5
    return factor * _cooled(seen, length, cooldown, cooldown_shape, cooldown_power, end_factor)


def warm_restarts(seen: int, length: int, *, period: float, period_factor: float, end_factor: float) -> float:
    """A cosine to `end_factor`, again and again, each `period_factor` times as long as the one before."""
    since = float(max(0, seen))
    while since >= period:
        since, period = since - period, period * period_factor
    return cosine(since, period, end_factor=end_factor)


SHAPES: dict[str, Callable[..., float]] = {
    shape.__name__: shape for shape in (cosine, linear, constant, rsqrt, warm_restarts)
}


def _progress(seen: float, length: float) -> float:
    return min(1.0, max(0, seen) / max(1, length))


def _cooled(seen: int, length: int, cooldown: int, shape: str, power: float, end_factor: float) -> float:
    """1, and in the last `cooldown` samples down to `end_factor`."""
    left = min(1.0, max(0, length - seen) / max(1, cooldown))
    fallen = left**power if shape == "power" else 1 - math.sqrt(1 - left)
    return end_factor + (1 - end_factor) * fallen
