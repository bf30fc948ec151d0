"""CLIP's tokenizer or one of transformers: what they have in common, and which it is to be."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int64

from clip_train.data.hf_tokenizer import HFTokenizer
from clip_train.data.tokenizer import ClipTokenizer


class CaptionTokenizer(Protocol):
    """Captions to rows of token ids.

    Attributes:
        context_length: ids per caption.
        room: how many of them are not start and end token.
        vocab_size: all ids are less.
    """

    context_length: int
    room: int
    vocab_size: int

    @property
    def pad_id(self) -> int | None:
        """What short captions are filled up with."""
        ...

    @property
    def end_id(self) -> int | None:
        """Of the token that ends a caption, if there is one."""
        ...

    def __call__(
        self, captions: Sequence[str], draws: Sequence[float] | np.ndarray | None = None
    ) -> Int64[np.ndarray, "captions context"]: ...

    def whole_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """All ids of each text, without start and end token, however many."""
        ...

    def frame(self, pieces: Sequence[Sequence[int]]) -> Int64[np.ndarray, "pieces context"]:
        """Rows for a model, of pieces of at most `room` ids."""
        ...


def choose_tokenizer(
    name: str, context_length: int, long_captions: str = "truncate", clean: str = "whitespace"
) -> CaptionTokenizer:
    """CLIP's tokenizer for the name `clip`, and else the one of transformers.

    Args:
        clean: for those of transformers; CLIP's has its own way.

    Raises:
        ConfigError: there is no such tokenizer, or a choice is none that there are.
    """
    if name == "clip":
        return ClipTokenizer(context_length, long_captions)
    return HFTokenizer(name, context_length, long_captions, clean)
