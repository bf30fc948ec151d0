"""Tokenizers of transformers, by name or folder: SigLIP's, BERT's, and so on."""

import string
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Int64

from clip_train.data.long_captions import check_long_captions, shorten
from clip_train.data.tokenizer import mend_caption
from clip_train.errors import ConfigError, first_line
from clip_train.hub import heed_network

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


class HFTokenizer:
    """Captions to token ids, equal to open_clip's tokenizer of the same name and `clean`.

    Args:
        name: of a tokenizer on the hub, or a folder.
        context_length: ids per caption, start and end token, as far as the tokenizer has them, included; shorter
            captions are padded as the tokenizer says.
        long_captions: what is kept of a caption with more ids than that, as in `ClipTokenizer`.
        clean: `whitespace` mends Unicode and collapses blanks; `lower` makes lower case of it, too; `canonicalize`
            drops the punctuation, too, as SigLIP wants it.

    Raises:
        ConfigError: the tokenizer is neither in the folder nor in the cache, and cannot be downloaded; it cannot pad;
            or a choice is none of these.
    """

    def __init__(
        self, name: str, context_length: int, long_captions: str = "truncate", clean: str = "whitespace"
    ) -> None:
        check_long_captions(long_captions)
        if clean not in CLEANERS:
            raise ConfigError(f"model.text.clean={clean} is none of {', '.join(CLEANERS)}")
        self.context_length, self.long_captions = context_length, long_captions
        self._clean, self._tokenizer = CLEANERS[clean], load_tokenizer(name)
        self.vocab_size: int = len(self._tokenizer)
        self.pad_id: int | None = self._tokenizer.pad_token_id
        self.end_id: int | None = self._tokenizer.eos_token_id
        if self.pad_id is None:
            raise ConfigError(f"model.text.tokenizer={name} has no padding token")
        self._start, self._end = self._special_ids(name)
        self.room = context_length - len(self._start) - len(self._end)

    def __call__(
        self, captions: Sequence[str], draws: Sequence[float] | np.ndarray | None = None
    ) -> Int64[np.ndarray, "captions context"]:
        """Tokenize a batch; the arguments are those of `ClipTokenizer`."""
        rows = []
        for i, row in enumerate(self.whole_ids(captions)):
            if len(row) > self.room:
                draw, caption = None if draws is None else draws[i], clean_whitespace(captions[i])
                row = shorten(row, self.room, self.long_captions, draw, caption, self.whole_ids)
            rows.append(row)
        return self.frame(rows)

    def whole_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """All ids of each text, without start and end token, however many."""
        if not len(texts):
            return []
        cleaned = [self._clean(text) for text in texts]
        return self._tokenizer(cleaned, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids

    def frame(self, pieces: Sequence[Sequence[int]]) -> Int64[np.ndarray, "pieces context"]:
        """Rows of the context's length: start token, at most `room` ids, end token, and padding where the tokenizer
        puts it."""
        ids = np.full((len(pieces), self.context_length), self.pad_id, dtype=np.int64)
        for row, piece in zip(ids, pieces):
            framed = [*self._start, *piece, *self._end]
            row[slice(0, len(framed)) if self._tokenizer.padding_side == "right" else slice(-len(framed), None)] = (
                framed
            )
        return ids

    def _special_ids(self, name: str) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after every text."""
        bare, whole = (self._tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                end = whole[start + len(bare) :]
                if self.context_length <= start + len(end):
                    raise ConfigError(f"model.text.context_length={self.context_length} has no room for words")
                return whole[:start], end
        raise ConfigError(f"model.text.tokenizer={name} changes a text's ids when it marks its start and end")


@cache  # Gemma's vocabulary takes a second
def load_tokenizer(name: str) -> Any:
    """transformers' tokenizer of a name on the hub or of a folder; raises ConfigError if there is none."""
    from transformers import AutoTokenizer

    heed_network()
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a missing file, no network, a broken file
        raise ConfigError(
            f"model.text.tokenizer={name}: none usable in a folder of that name or in the cache, and none can be"
            f" downloaded ({first_line(error)}); fetch it where there is a network, or give the folder of a tokenizer"
        ) from error


def clean_whitespace(caption: str) -> str:
    """Mend broken Unicode, resolve HTML entities, collapse blanks."""
    return " ".join(mend_caption(caption).split())


def clean_lower(caption: str) -> str:
    """Also make lower case of it."""
    return clean_whitespace(caption).lower()


def canonicalize(caption: str) -> str:
    """Also drop ASCII punctuation, but for underscores, which become blanks (big_vision's, for SigLIP)."""
    return " ".join(mend_caption(caption).translate(_NO_PUNCTUATION).lower().split())


CLEANERS = {"whitespace": clean_whitespace, "lower": clean_lower, "canonicalize": canonicalize}
