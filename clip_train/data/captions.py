"""Where a sample's captions are, which of them is drawn, and words left out of it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from clip_train.data.class_names import LABEL_EXTENSION, ClassNames
from clip_train.data.keyed_random import WORD_DROPOUT, keyed_uniforms
from clip_train.errors import ConfigError

CaptionFault = Literal["caption_missing", "caption_not_utf8", "caption_empty"]
LabelFault = Literal["label_missing", "label_not_a_number", "label_out_of_range"]


class UnusableCaption(ValueError):
    """A sample without a caption or label one could train on.

    Attributes:
        kind: what is wrong, in a word to count by.
    """

    def __init__(self, message: str, kind: CaptionFault | LabelFault) -> None:
        super().__init__(message)
        self.kind: CaptionFault | LabelFault = kind


@dataclass(frozen=True)
class CaptionKey:
    """`txt` is the text of the file with that extension; `json:a.b` the entry b of the entry a of its JSON.

    With `classes`, the file is the number of a class, whose captions are its name in their templates.
    """

    extension: str
    path: tuple[str, ...] = ()
    classes: ClassNames | None = None

    @classmethod
    def parse(cls, key: str, classes: ClassNames | None = None) -> "CaptionKey":
        """Raises ConfigError for a key of neither form. The class names are for the key `cls`."""
        extension, colon, path = key.partition(":")
        if not extension or (colon and not path) or (colon and extension != "json"):
            raise ConfigError(
                f"caption_key={key!r} is neither an extension such as txt nor a path such as json:captions"
            )
        return cls(extension, tuple(path.split(".")) if path else (), classes if extension == LABEL_EXTENSION else None)

    def read(self, content: bytes) -> list[str]:
        """The captions of one sample: one, or several of which each epoch draws one.

        Raises:
            UnusableCaption: not UTF-8, not JSON, no such entry, no text in it; with class names, not a label.
        """
        if self.classes is not None:
            return self.classes.captions(read_label(content, len(self.classes)))
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnusableCaption(str(error), "caption_not_utf8") from error
        value = self._entry(text) if self.path else text
        captions = value if isinstance(value, list) else [value]
        usable = [caption for caption in captions if isinstance(caption, str) and caption.strip()]
        if not usable:
            raise UnusableCaption("empty caption", "caption_empty")
        return usable

    def _entry(self, text: str) -> object:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # not JSON, or JSON to break a parser
            raise UnusableCaption(str(error), "caption_missing") from error
        for name in self.path:
            if not isinstance(value, dict) or name not in value:
                found = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
                raise UnusableCaption(f"no entry {name!r} in its json (found: {found})", "caption_missing")
            value = value[name]
        return value


@dataclass(frozen=True)
class CaptionSource:
    """One key, or several with weights, of which one is drawn each time a sample comes up.

    Attributes:
        keys: the heaviest first.
        shares: how often each is drawn; they add up to 1.
    """

    keys: tuple[CaptionKey, ...]
    shares: tuple[float, ...]

    @classmethod
    def parse(cls, config: str | Mapping[str, float], classes: ClassNames | None = None) -> "CaptionSource":
        """`txt`, `json:captions`, `cls`, or several with their weights, `{txt: 0.7, json:synthetic: 0.3}`.

        Args:
            classes: what the numbers in `cls` files stand for.

        Raises:
            ConfigError: a key of neither form, or a weight that is not a positive number.
        """
        weights = {config: 1.0} if isinstance(config, str) else config
        if not isinstance(weights, Mapping) or not weights:
            raise ConfigError(f"caption_key={config!r} is neither a key such as txt nor a mapping of keys to weights")
        for key, weight in weights.items():
            if not isinstance(weight, int | float) or not 0 < weight < math.inf:
                hint = r" (on a command line write json\:path for the key)" if key == "json" else ""
                raise ConfigError(f"caption_key: {key} has the weight {weight}, which is not a positive number{hint}")
        heaviest_first = sorted(weights.items(), key=lambda item: -item[1])
        total = sum(weights.values())
        keys = tuple(CaptionKey.parse(key, classes) for key, _ in heaviest_first)
        return cls(keys, tuple(weight / total for _, weight in heaviest_first))

    @classmethod
    def none(cls) -> "CaptionSource":
        """Of pictures without captions: the first one is empty."""
        return cls((), ())

    @property
    def extensions(self) -> tuple[str, ...]:
        """Of the files to read. A sample that has one of them has a caption."""
        return tuple(dict.fromkeys(key.extension for key in self.keys))

    @property
    def classes(self) -> ClassNames | None:
        """Of the samples' labels; None where no key is `cls`."""
        return next((key.classes for key in self.keys if key.classes is not None), None)

    def label(self, files: Mapping[str, bytes]) -> int:
        """The sample's class; for a source that has `classes`. Raises UnusableCaption if it tells none."""
        if LABEL_EXTENSION not in files:
            raise UnusableCaption(f"no {LABEL_EXTENSION} file", "label_missing")
        return read_label(files[LABEL_EXTENSION], len(self.classes or ()))

    def draw(self, files: Mapping[str, bytes], uniform: float) -> str:
        """A caption by chance: the key by weight, and one of its captions if it has several.

        Where the key has no usable caption, the others are tried, the heaviest first.

        Args:
            files: the sample's contents by extension, as far as it has them.
            uniform: in [0, 1); decides everything.

        Raises:
            UnusableCaption: no key has one; says why the drawn one has not.
        """
        number = 0
        while number < len(self.shares) - 1 and uniform >= self.shares[number]:
            uniform -= self.shares[number]
            number += 1
        rest = uniform / self.shares[number]  # uniform again, given the key
        others = [key for key in self.keys if key != self.keys[number]]
        _, captions = _first_readable([self.keys[number], *others], files)
        return captions[min(int(rest * len(captions)), len(captions) - 1)]

    def first(self, files: Mapping[str, bytes]) -> str:
        """The first caption of the heaviest key that has one, for evaluation. Raises UnusableCaption as `draw`."""
        return _first_readable(self.keys, files)[1][0] if self.keys else ""

    def all(self, files: Mapping[str, bytes]) -> list[str]:
        """All captions of the heaviest key that has any, for evaluation; of a text file, each line is one.

        Raises UnusableCaption as `draw`.
        """
        key, captions = _first_readable(self.keys, files)
        if key.path or key.classes is not None:
            return captions
        return [line for caption in captions for line in caption.splitlines() if line.strip()]


def read_label(content: bytes, num_classes: int) -> int:
    """The number of a class, as text.

    Raises:
        UnusableCaption: it is empty, not a whole number, or there is no such class.
    """
    text = content.decode("utf-8", "replace").strip()
    if not text:
        raise UnusableCaption(f"empty {LABEL_EXTENSION} file", "label_missing")
    if not text.removeprefix("-").isdecimal():
        raise UnusableCaption(f"the label {text[:40]!r} is not a whole number", "label_not_a_number")
    if not 0 <= int(text[:20]) < num_classes:
        raise UnusableCaption(f"the label {text[:40]} is none of 0 to {num_classes - 1}", "label_out_of_range")
    return int(text)


def _first_readable(keys: Sequence[CaptionKey], files: Mapping[str, bytes]) -> tuple[CaptionKey, list[str]]:
    """The first key that has captions, and they; else the first key's error."""
    errors = []
    for key in keys:
        try:
            if key.extension not in files:
                raise UnusableCaption(f"no {key.extension} file", "caption_missing")
            return key, key.read(files[key.extension])
        except UnusableCaption as error:
            errors.append(error)
    raise errors[0]


def drop_words(caption: str, rate: float, uniform: float) -> str:
    """Leave out each word with probability `rate`, but never all: the luckiest stays.

    Args:
        rate: in [0, 1]. A caption that loses no word comes back as it was.
        uniform: in [0, 1); decides which words go.
    """
    words = caption.split()
    draws = keyed_uniforms(WORD_DROPOUT, int(uniform * 2**53), count=len(words))
    dropped = draws < rate
    if not dropped.any():
        return caption
    dropped[draws.argmax()] = False
    return " ".join(word for word, gone in zip(words, dropped.tolist()) if not gone)
