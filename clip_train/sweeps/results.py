"""What a sweep leaves for people: results.csv and the best trial as an experiment."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from clip_train.data.files import write_atomic
from clip_train.sweeps.objective import Objective
from clip_train.sweeps.trial import COMPLETE, Trial, read_samples_seen

COLUMNS = ("number", "state", "metric", "samples_seen", "overrides", "run_folder")
_RUN_LENGTHS = ("max_samples", "max_steps", "max_epochs")
_OF_THE_SWEEP = ("output_dir", "run_name", "resume.from", "sweep")  # not of what is trained


def write_results(path: Path, trials: Sequence[Trial]) -> None:
    """A row for each trial: the columns above, then what it has of its own, a column for each key."""
    rows = [_row(trial) for trial in sorted(trials, key=lambda trial: trial.number)]
    columns = list(dict.fromkeys([*COLUMNS, *(column for row in rows for column in row)]))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def _row(trial: Trial) -> dict[str, Any]:
    own = dict(override.split("=", 1) for override in trial.overrides)
    seen = read_samples_seen(trial.folder)
    cells = (trial.number, trial.state, trial.value, seen, " ".join(trial.overrides), trial.folder)
    return {**dict(zip(COLUMNS, cells)), **own}


def best_trial(trials: Sequence[Trial], objective: Objective) -> Trial | None:
    """The complete trial with the best value."""
    complete = {trial.number: trial for trial in trials if trial.state == COMPLETE and trial.value is not None}
    number = objective.best({number: trial.value for number, trial in complete.items() if trial.value is not None})
    return None if number is None else complete[number]


def write_best(folder: Path, trial: Trial, fixed: Sequence[str], groups: Sequence[str], objective: Objective) -> None:
    """`experiment/best.yaml`: the trial's overrides, so that `--config-dir FOLDER experiment=best` trains it again.

    Args:
        folder: of the sweep.
        trial: the best.
        fixed: the overrides of every trial.
        groups: names of the config groups: choices of these go into the defaults list.
        objective: the trial's value is of this.
    """
    path = folder / "experiment" / "best.yaml"
    path.parent.mkdir(exist_ok=True)
    text = f"""\
# @package _global_
# Trial {trial.number}: {objective.name} {trial.value:.6g}. To train it again:
#   clip-train --config-dir {folder} experiment=best
"""
    write_atomic(path, (text + _experiment([*fixed, *trial.overrides], groups)).encode())


def _experiment(overrides: Sequence[str], groups: Sequence[str]) -> str:
    """Overrides in the form of a config file."""
    parsed = {override.key_or_group: override for override in OverridesParser.create().parse_overrides([*overrides])}
    defaults: list[Any] = []
    values: dict[str, Any] = {}
    removed: list[str] = []
    for key, override in parsed.items():
        if key in _OF_THE_SWEEP:
            continue
        if override.is_delete():
            removed.append(f"# Add to the command line, as a file cannot remove a key: {override.input_line}\n")
        elif key == "experiment":
            defaults.insert(0, override.value())
        elif key in groups:
            defaults.append({f"override /{override.get_key_element().lstrip('+')}": override.value()})
        else:
            _set(values, key, override)
    if any(key in values for key in _RUN_LENGTHS):  # one of the three; the others may have a value elsewhere
        values = {**dict.fromkeys(_RUN_LENGTHS), **values}
    parts = [{"defaults": [*defaults, "_self_"]}, values] if defaults else [values]
    return "".join(removed) + "".join(yaml.safe_dump(part, sort_keys=False) for part in parts if part)


def _set(values: dict[str, Any], key: str, override: Override) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[name] = override.value()
