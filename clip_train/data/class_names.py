"""The names of a labelled set's classes, and the captions that stand for them: from templates, or of each its own."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from clip_train.data.beside import read_if_there, sibling
from clip_train.data.remote import scheme_of
from clip_train.errors import ConfigError, DataError

LABEL_EXTENSION = "cls"
CLASSES_JSON, NAMES_TXT, TEMPLATES_TXT = "classes.json", "classnames.txt", "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATE = "a photo of a {}."

_GAP = re.compile(r"\{c?\}")  # clip-benchmark writes {c}


@dataclass(frozen=True)
class ClassNames:
    """Label n is the class `names[n]`; each template has `{}` where the name goes.

    Attributes:
        prompts: each class's captions, in place of its name in the templates, of which there are none then.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def captions(self, label: int) -> list[str]:
        """The class's own prompts, or its name in every template."""
        if self.prompts is not None:
            return list(self.prompts[label])
        return [_GAP.sub(lambda _: self.names[label], template) for template in self.templates]

    @property
    def captions_per_class(self) -> int:
        """How many captions a class has. Raises ConfigError if some have more than others."""
        counts = {len(self.captions(label)): name for label, name in enumerate(self.names)}
        if len(counts) > 1:
            (fewest, few), *_, (most, many) = sorted(counts.items())
            raise ConfigError(f"class {few!r} has {fewest} prompts and {many!r} {most}: here each needs equally many")
        return next(iter(counts))

    def one_caption_each(self) -> list["ClassNames"]:
        """The classes with the first caption of each, with the second of each, and so on.

        Raises:
            ConfigError: some have more captions than others.
        """
        columns = [[self.captions(label)[n] for label in range(len(self))] for n in range(self.captions_per_class)]
        return [ClassNames(self.names, (), tuple((caption,) for caption in column)) for column in columns]


def read_class_names(
    address: str | None, shard: str, setting: str = "data.classes", retries: int = 10, timeout: float = 60.0
) -> ClassNames:
    """Read `classes.json`, or `classnames.txt` with `zeroshot_classification_templates.txt` as clip-benchmark has them.

    Args:
        address: of the json, of a YAML of the same form or of `{name: [prompt, ...], ...}`, of the names, or of their
            folder, here or elsewhere; None looks beside the shard and in the folder above, where clip-benchmark has
            them.
        shard: path or address of the set's first shard.
        setting: the config key, for errors.
        retries, timeout: see `read_if_there`.

    Raises:
        DataError: there are no such files, or they do not say what they should.
    """
    read = {"retries": retries, "timeout": timeout}
    if address is None:
        tried = [] if scheme_of(shard) == "pipe" else [sibling(shard, "_"), sibling(shard, "../_")]
    elif address.endswith((".json", ".yaml", ".yml", ".txt")):
        content = read_if_there(address, **read)
        if content is None:
            raise DataError(f"{setting}={address}: there is no such file")
        if address.endswith((".yaml", ".yml")):
            return _from_yaml(content, address)
        return _from_json(content, address) if address.endswith(".json") else _from_lines(content, address, read)
    else:
        tried = [f"{address.rstrip('/')}/_"]
    for place in tried:
        for name in (CLASSES_JSON, NAMES_TXT):
            found = sibling(place, name)
            if (content := read_if_there(found, **read)) is not None:
                return _from_json(content, found) if name == CLASSES_JSON else _from_lines(content, found, read)
    where = f"beside {shard}, nor in the folder above" if address is None else f"in {address}"
    raise DataError(f"no {CLASSES_JSON} or {NAMES_TXT} {where}: give {setting}, the path of one")


def _from_json(content: bytes, address: str) -> ClassNames:
    try:
        value: Any = json.loads(content)
        names, templates = value["classnames"], value.get("templates") or [DEFAULT_TEMPLATE]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f'{address} is not JSON of the form {{"classnames": [...], "templates": [...]}}') from error
    return _checked(names, templates, address)


def _from_yaml(content: bytes, address: str) -> ClassNames:
    try:
        value: Any = yaml.safe_load(content)
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{address} is not YAML: {' '.join(str(error).split())[:200]}") from error
    if isinstance(value, Mapping) and "classnames" in value:
        return _checked(value["classnames"], value.get("templates") or [DEFAULT_TEMPLATE], address)
    if not isinstance(value, Mapping) or not value:
        raise DataError(
            f"{address} is neither {{name: [prompt, ...], ...}} nor {{classnames: [...], templates: [...]}}"
        )
    for name, prompts in value.items():
        if not isinstance(name, str):
            raise DataError(f"{address}: the class name {name!r} is not a text: put it into quotation marks")
        _check_texts(prompts, f"prompts of {name}", address)
    return ClassNames(tuple(value), (), tuple(tuple(prompts) for prompts in value.values()))


def _from_lines(content: bytes, address: str, read: dict[str, Any]) -> ClassNames:
    templates = read_if_there(sibling(address, TEMPLATES_TXT), **read)
    try:
        return _checked(_lines(content), _lines(templates or DEFAULT_TEMPLATE.encode()), address)
    except UnicodeDecodeError as error:
        raise DataError(f"{address} or the templates beside it are not UTF-8") from error


def _lines(content: bytes) -> list[str]:
    return [line.strip() for line in content.decode("utf-8").splitlines() if line.strip()]


def _checked(names: Any, templates: Any, address: str) -> ClassNames:
    for what, values in (("class names", names), ("templates", templates)):
        _check_texts(values, what, address)
    for template in templates:
        if not _GAP.search(template):
            raise DataError(f"{address}: the template {template!r} has no {{}} for the class name")
    return ClassNames(tuple(names), tuple(templates))


def _check_texts(values: Any, what: str, address: str) -> None:
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise DataError(f"{address}: its {what} are not a list of texts")
