"""Where a sample's captions are, and how to read them."""

import json
from dataclasses import dataclass

from clip_train.errors import ConfigError


class UnusableCaption(ValueError):
    """A sample without a caption one could train on."""


@dataclass(frozen=True)
class CaptionKey:
    """`txt` is the text of the file with that extension; `json:a.b` the entry b of the entry a of its JSON."""

    extension: str
    path: tuple[str, ...] = ()

    @classmethod
    def parse(cls, key: str) -> "CaptionKey":
        """Raises ConfigError for a key of neither form."""
        extension, colon, path = key.partition(":")
        if not extension or (colon and not path) or (colon and extension != "json"):
            raise ConfigError(
                f"caption_key={key!r} is neither an extension such as txt nor a path such as json:captions"
            )
        return cls(extension, tuple(path.split(".")) if path else ())

    def read(self, content: bytes) -> list[str]:
        """The captions of one sample: one, or several of which each epoch draws one.

        Raises:
            UnusableCaption: not UTF-8, not JSON, no such entry, no text in it.
        """
        try:
            text = content.decode("utf-8")
            value = self._entry(json.loads(text)) if self.path else text
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or JSON to break a parser
            raise UnusableCaption(str(error)) from error
        captions = value if isinstance(value, list) else [value]
        usable = [caption for caption in captions if isinstance(caption, str) and caption.strip()]
        if not usable:
            raise UnusableCaption("empty caption")
        return usable

    def _entry(self, value: object) -> object:
        for name in self.path:
            if not isinstance(value, dict) or name not in value:
                found = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
                raise UnusableCaption(f"no entry {name!r} in its json (found: {found})")
            value = value[name]
        return value
