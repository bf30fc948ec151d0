"""Embeddings of texts longer than the model's context, from embeddings of their parts."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from clip_train.data.long_captions import split_sentences
from clip_train.data.tokenizer_choice import CaptionTokenizer
from clip_train.errors import ConfigError
from clip_train.heartbeat import beat

WAYS = ("truncate", "chunk_mean", "sliding_window", "max_pool", "hierarchical")


class _Piece(NamedTuple):
    """Ids that fit the context, and how much they weigh in their text."""

    ids: list[int]
    weight: float = 1.0


@torch.no_grad()
def embed_texts(
    texts: Sequence[str],
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: CaptionTokenizer,
    *,
    way: str = "truncate",
    stride: int | None = None,
    batch_size: int = 128,
    device: torch.device,
) -> Float[Tensor, "texts embed"]:
    """Unit vectors of texts of any length. One that fits the context is the same in all ways but `hierarchical`.

    Args:
        encode_text: token ids, on the host, to unit vectors.
        way: `truncate` takes the beginning. `chunk_mean` takes the mean over as few parts as the text needs, equally
            long; `max_pool` the greatest of each coordinate over the same parts; `sliding_window` the mean over windows
            of the whole context; `hierarchical` the mean over the sentences, each weighted by its tokens (a sentence
            that does not fit is itself cut into parts). The result is normalised again.
        stride: tokens from one window to the next; None for half of the context.
        batch_size: parts per forward pass.
        device: where the text tower is.

    Raises:
        ConfigError: there is no such way, or the stride is not between 1 and the tokens of a window.
    """
    check_way(way, stride, tokenizer.room)
    cut = _sentence_pieces(texts, tokenizer) if way == "hierarchical" else _pieces(texts, tokenizer, way, stride)
    pieces = list(chain.from_iterable(cut))
    parts = []
    for start in range(0, len(pieces), batch_size):
        beat()
        ids = tokenizer.frame([piece.ids for piece in pieces[start : start + batch_size]])
        parts.append(encode_text(torch.from_numpy(ids)).float())
    vectors = torch.cat(parts) if parts else torch.empty(0, 0, device=device)
    text = torch.tensor([number for number, own in enumerate(cut) for _ in own], dtype=torch.int64, device=device)
    joined = vectors.new_zeros(len(texts), vectors.shape[1])
    if way == "max_pool":
        joined.scatter_reduce_(0, text[:, None].expand_as(vectors), vectors, "amax", include_self=False)
    else:
        weights = torch.tensor([piece.weight for piece in pieces], device=device)
        joined.index_add_(0, text, weights[:, None] * vectors)
    return F.normalize(joined, dim=-1)


def check_way(way: str, stride: int | None, room: int, prefix: str = "") -> None:
    """Raises ConfigError as `embed_texts` does.

    Args:
        room: tokens of a window.
        prefix: of the settings' names, for errors.
    """
    if way not in WAYS:
        raise ConfigError(f"{prefix}long_text={way} is none of {', '.join(WAYS)}")
    if stride is not None and not 1 <= stride <= room:
        raise ConfigError(f"{prefix}stride={stride} is not a number of tokens between 1 and the {room} of a window")


def _pieces(texts: Sequence[str], tokenizer: CaptionTokenizer, way: str, stride: int | None) -> list[list[_Piece]]:
    room = tokenizer.room
    cut: dict[str, Callable[[list[int]], list[list[int]]]] = {
        "truncate": lambda ids: [ids[:room]],
        "chunk_mean": lambda ids: _equal_parts(ids, room),
        "max_pool": lambda ids: _equal_parts(ids, room),
        "sliding_window": lambda ids: _windows(ids, room, stride or max(1, room // 2)),
    }
    return [[_Piece(part) for part in cut[way](ids)] for ids in tokenizer.whole_ids(texts)]


def _sentence_pieces(texts: Sequence[str], tokenizer: CaptionTokenizer) -> list[list[_Piece]]:
    sentences = [split_sentences(" ".join(text.split())) or [""] for text in texts]
    ids = iter(tokenizer.whole_ids(list(chain.from_iterable(sentences))))
    cut = [[part for _ in own for part in _equal_parts(next(ids), tokenizer.room)] for own in sentences]
    return [[_Piece(part, max(1, len(part))) for part in parts] for parts in cut]


def _equal_parts(ids: list[int], room: int) -> list[list[int]]:
    """As few parts as fit, so that no short rest weighs as much as the others."""
    count = max(1, -(-len(ids) // room))
    return [ids[len(ids) * part // count : len(ids) * (part + 1) // count] for part in range(count)]


def _windows(ids: list[int], room: int, stride: int) -> list[list[int]]:
    """Windows of `room` ids; the last one ends with the text."""
    last = max(0, len(ids) - room)
    return [ids[start : start + room] for start in (*range(0, last, stride), last)]
