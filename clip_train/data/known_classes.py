"""Class names and templates of well-known sets, from clip-benchmark's files."""

import json
from importlib.resources import files
from typing import Any

from clip_train.data.class_names import DEFAULT_TEMPLATE, ClassNames
from clip_train.errors import ConfigError

_ALIASES = {"imagenet": "imagenet1k"}
_NAMES, _TEMPLATES = "classnames", "zeroshot_classification_templates"


def known_classes(dataset: str, language: str = "en", setting: str = "task.classnames") -> ClassNames:
    """The classes of a set, such as `imagenet1k`, in the order of its labels, with the set's templates if it has any.

    Args:
        dataset: under clip-benchmark's name.
        language: one that clip-benchmark has: `en`, `ar`, `cn`, `it` or `jp`.
        setting: the config key, for errors.

    Raises:
        ConfigError: clip-benchmark is not installed, or does not know them.
    """
    table = _table(_NAMES, language)
    if (names := _entry(table, dataset)) is None:
        raise ConfigError(
            f"{setting}={dataset}: clip-benchmark has those of {', '.join(sorted(table))};"
            " those of other sets are in their own files"
        )
    return ClassNames(names, _entry(_table(_TEMPLATES, language), dataset) or (DEFAULT_TEMPLATE,))


def known_templates(dataset: str, language: str = "en") -> tuple[str, ...]:
    """The templates for a set, such as `imagenet1k` or `cifar10`. Arguments and errors as for `known_classes`."""
    if (templates := _entry(_table(_TEMPLATES, language), dataset)) is None:
        known = ", ".join(sorted(_table(_TEMPLATES, language)))
        raise ConfigError(f"task.templates={dataset}: clip-benchmark has those of {known}")
    return templates


def _entry(table: dict[str, Any], dataset: str) -> tuple[str, ...] | None:
    found = table.get(_ALIASES.get(dataset, dataset))
    return None if found is None else tuple(found)


def _table(what: str, language: str) -> dict[str, Any]:
    try:
        folder = files("clip_benchmark") / "datasets"
    except ModuleNotFoundError as error:
        raise ConfigError(
            "names of well-known sets need clip-benchmark: pip install '.[eval]' in the checkout"
        ) from error
    try:
        return json.loads((folder / f"{language}_{what}.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"task.language={language}: clip-benchmark has no {what} in it") from error
