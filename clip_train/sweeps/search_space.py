"""Hydra's words for what to try (choice, range, interval, tag), as distributions of Optuna's."""

from collections.abc import Sequence
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from clip_train.errors import ConfigError


def split_overrides(arguments: Sequence[str]) -> tuple[dict[str, BaseDistribution], list[str]]:
    """What is searched, by key, and the overrides that are the same in every trial. Of two for one key the last counts.

    Raises:
        ConfigError: nothing is searched, or in a way that Optuna does not know.
    """
    overrides = {
        override.get_key_element(): override for override in OverridesParser.create().parse_overrides([*arguments])
    }
    space = {key: distribution(override) for key, override in overrides.items() if override.is_sweep_override()}
    if not space:
        raise ConfigError(
            "hydra/sweeper=optuna has nothing to search: give a key an interval, such as "
            "optim.lr='tag(log, interval(1e-5, 1e-2))', or take sweep=lr_wd"
        )
    fixed = [override.input_line or "" for key, override in overrides.items() if key not in space]
    return space, fixed


def distribution(override: Override) -> BaseDistribution:
    """`a,b` is categories, `range(...)` steps, `interval(...)` continuous, `int(interval(...))` whole numbers.

    Raises:
        ConfigError: Optuna has no such distribution.
    """
    value, log = cast(Any, override.value()), "log" in cast(Any, override.value()).tags
    try:
        if isinstance(value, IntervalSweep):
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            return (IntDistribution if whole else FloatDistribution)(value.start, value.end, log=log)  # pyright: ignore[reportArgumentType]
        if isinstance(value, RangeSweep) and not value.shuffle:
            return _steps(override, log)
        return CategoricalDistribution([*override.sweep_iterator(transformer=Transformer.encode)])  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{override.input_line}: {error}") from error


def _steps(override: Override, log: bool) -> BaseDistribution:
    values = cast(list, [*override.sweep_iterator()])
    if all(isinstance(value, int) for value in values):
        step = 1 if log or len(values) == 1 else values[1] - values[0]
        return IntDistribution(min(values), max(values), step=abs(step), log=log)
    values = [round(value, 12) for value in values]  # 0.1 + 0.2
    step = round(abs(values[1] - values[0]), 12) if len(values) > 1 else None
    return FloatDistribution(min(values), max(values), step=step)
