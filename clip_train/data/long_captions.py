"""What is kept of a caption with more tokens than a model takes."""

import re
from collections.abc import Callable

from clip_train.errors import ConfigError

LONG_CAPTIONS = ("truncate", "random_crop", "sentence")
_SENTENCE_END = re.compile(r"""(?<=[.!?]) |(?<=[.!?]["'”’)]) |(?<=[。！？])""")


def check_long_captions(choice: str) -> None:
    """Raises ConfigError for a choice that there is not."""
    if choice not in LONG_CAPTIONS:
        raise ConfigError(f"data.long_captions={choice} is none of {', '.join(LONG_CAPTIONS)}")


def shorten(
    ids: list[int],
    room: int,
    choice: str,
    draw: float | None,
    caption: str,
    encode: Callable[[list[str]], list[list[int]]],
) -> list[int]:
    """At most `room` of a caption's ids.

    Args:
        ids: without start and end token; more than `room`.
        choice: `truncate`: the beginning; `random_crop`: as many consecutive ids, from anywhere; `sentence`: whole
            sentences, from any one on.
        draw: in [0, 1), decides where; None for the beginning.
        caption: the text that the ids are of.
        encode: texts to ids without start and end token.
    """
    if draw is None or choice == "truncate":
        return ids[:room]
    if choice == "random_crop":
        first = int(draw * (len(ids) - room + 1))
        return ids[first : first + room]
    sentences = split_sentences(caption)
    sentences = sentences[int(draw * len(sentences)) :]
    kept: list[int] = []
    for sentence in encode(sentences):
        if kept and len(kept) + len(sentence) > room:
            break
        kept += sentence
    return kept[:room]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in which single blanks are between words."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence]
