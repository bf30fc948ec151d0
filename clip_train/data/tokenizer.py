"""CLIP's byte-pair tokenizer: the original 49,408 ids, offline, on the Rust `tokenizers` library."""

import gzip
import html
import itertools
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import ftfy
import numpy as np
from jaxtyping import Int64
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

from clip_train.data.long_captions import LONG_CAPTIONS as LONG_CAPTIONS
from clip_train.data.long_captions import check_long_captions, shorten

VOCAB_SIZE = 49408
START_TOKEN, END_TOKEN = "<start_of_text>", "<end_of_text>"
START_ID, END_ID = VOCAB_SIZE - 2, VOCAB_SIZE - 1
_NUM_MERGES = VOCAB_SIZE - 2 - 512  # 256 bytes, each alone and at the end of a word, and the two special tokens
_END_OF_WORD = "</w>"
# The original pattern ignores case. Captions are lower-cased before, so that this shows in two characters only: the
# long s matches 's', and U+0345 (a mark whose capital is a letter) matches neither class and is dropped.
_WORDS = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{0345}]+"


class ClipTokenizer:
    """Captions to token ids, equal to OpenAI's and open_clip's.

    Args:
        context_length: ids per caption, start and end token included; shorter captions are padded with 0.
        long_captions: what is kept of a caption with more ids than that. `truncate`: the beginning, as the originals
            do; `random_crop`: as many consecutive ids, from anywhere; `sentence`: whole sentences, from any one on.

    Raises:
        ConfigError: `long_captions` is none of these.
    """

    vocab_size, pad_id, end_id = VOCAB_SIZE, 0, END_ID

    def __init__(self, context_length: int = 77, long_captions: str = "truncate") -> None:
        check_long_captions(long_captions)
        self.context_length, self.long_captions = context_length, long_captions
        self.room = context_length - 2
        self._tokenizer = _byte_pair_tokenizer()

    def __call__(
        self, captions: Sequence[str], draws: Sequence[float] | np.ndarray | None = None
    ) -> Int64[np.ndarray, "captions context"]:
        """Tokenize a batch.

        Args:
            captions: any text.
            draws: a number in [0, 1) for each, that decides what is kept of a long caption. Without, its beginning is.
        """
        cleaned = [clean_caption(caption) for caption in captions]
        encodings = self._tokenizer.encode_batch_fast(cleaned)
        ids = np.zeros((len(captions), self.context_length), dtype=np.int64)
        for i, encoding in enumerate(encodings):
            row = encoding.ids
            if len(row) > self.context_length:
                draw = None if draws is None else draws[i]
                kept = shorten(row[1:-1], self.room, self.long_captions, draw, cleaned[i], self._bare_ids)
                row = [START_ID, *kept, END_ID]
            ids[i, : len(row)] = row
        return ids

    def whole_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """All ids of each text, without start and end token, however many."""
        return self._bare_ids([clean_caption(text) for text in texts])

    def frame(self, pieces: Sequence[Sequence[int]]) -> Int64[np.ndarray, "pieces context"]:
        """Rows of the context's length: start token, at most `room` ids, end token, padding."""
        ids = np.zeros((len(pieces), self.context_length), dtype=np.int64)
        for row, piece in zip(ids, pieces):
            row[: len(piece) + 2] = [START_ID, *piece, END_ID]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The words between start and end token, in lower case and with a blank after each."""
        inside = itertools.takewhile(lambda number: number != END_ID, (n for n in ids if n != START_ID))
        return b"".join(_bytes_of_words()[number] for number in inside).decode(errors="replace").strip()

    def _bare_ids(self, cleaned: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(cleaned, add_special_tokens=False)]


def clean_caption(caption: str) -> str:
    """Mend it, collapse blanks, lower."""
    return " ".join(mend_caption(caption).split()).lower()


def mend_caption(caption: str) -> str:
    """Mend broken Unicode, and resolve HTML entities, twice, as they are often escaped twice."""
    if caption.isascii() and caption.isprintable() and "&" not in caption:
        return caption  # there is nothing to mend
    return html.unescape(html.unescape(ftfy.fix_text(caption)))


@cache  # it takes a tenth of a second, and nothing changes it
def _byte_pair_tokenizer() -> Tokenizer:
    words, merges = byte_pair_vocabulary()
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=_END_OF_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START_TOKEN} $A {END_TOKEN}",
        special_tokens=[(START_TOKEN, START_ID), (END_TOKEN, END_ID)],
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (START_TOKEN, END_TOKEN)])
    return tokenizer


def byte_pair_vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """The words of CLIP's vocabulary in the order of their ids, start and end token last, and the merges."""
    merges, letters = _read_merges(), _letters_of_bytes().values()
    words = [*letters, *(f"{letter}{_END_OF_WORD}" for letter in letters), *("".join(merge) for merge in merges)]
    return [*words, START_TOKEN, END_TOKEN], merges


def _read_merges() -> list[tuple[str, str]]:
    packed = (files("clip_train") / "assets" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 1 + _NUM_MERGES]
    return [(left, right) for left, right in (line.split() for line in lines)]


def _letters_of_bytes() -> dict[int, str]:
    """GPT-2's printable letter for each byte, in the order of CLIP's vocabulary: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@cache
def _bytes_of_words() -> list[bytes]:
    """What each word of the vocabulary stands for, with a blank where a word of the text ends."""
    byte_of = {letter: byte for byte, letter in _letters_of_bytes().items()}
    words = byte_pair_vocabulary()[0]
    return [
        bytes(byte_of[letter] for letter in word.removesuffix(_END_OF_WORD)) + b" " * word.endswith(_END_OF_WORD)
        for word in words
    ]
