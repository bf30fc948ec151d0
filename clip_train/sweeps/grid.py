"""Every combination of the values given."""

from collections.abc import Callable, Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from clip_train.errors import ConfigError
from clip_train.sweeps.trial import Trial, TrialFile


class GridTrials:
    """The points of a grid, in the order of Hydra's own sweeper.

    Args:
        arguments: overrides, some with several values.
        run_folder: of a trial, by its number.

    Attributes:
        fixed: the overrides with one value.

    Raises:
        ConfigError: an interval is given, or the folder holds another grid.
    """

    def __init__(self, arguments: Sequence[str], run_folder: Callable[[int], Path]) -> None:
        overrides = OverridesParser.create().parse_overrides([*arguments])
        if interval := next((override for override in overrides if override.is_interval_sweep()), None):
            raise ConfigError(
                f"{interval.input_line}: a grid has no intervals; list values, or add hydra/sweeper=optuna"
            )
        swept = [override for override in overrides if override.is_sweep_override()]
        self.fixed = [override.input_line or "" for override in overrides if not override.is_sweep_override()]
        (points,) = BasicSweeper.split_arguments(swept, None)
        self._trials = [Trial(number, tuple(point), run_folder(number)) for number, point in enumerate(points)]
        self._left = list(self._trials)
        for trial in self._trials:
            known = TrialFile(trial.folder).read()
            if known and tuple(known["overrides"]) != trial.overrides:
                before, now = (" ".join(overrides) or "nothing" for overrides in (known["overrides"], trial.overrides))
                raise ConfigError(f"{trial.folder} is a trial with {before}, not {now}: choose another hydra.sweep.dir")

    def next(self) -> Trial | None:
        """The next point."""
        return self._left.pop(0) if self._left else None

    def finish(self, trial: Trial) -> None:
        """A point's state is in its run folder."""

    def all(self) -> list[Trial]:
        """All points."""
        return self._trials
