"""Texts encoded only as long as they are: in groups of similar length, each without most of its padding.

A causal tower that is read at the end token makes nothing of what follows it, and one that masks its padding makes
nothing of that. Captions of the web have some 11 words; a context has 77 tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenIds:
    """Token ids on a device, and their texts' lengths on the host: to ask the device for them would be to wait for it.

    Attributes:
        ids: padded.
        lengths: tokens of each text that matter.
    """

    ids: Int64[Tensor, "b context"]
    lengths: Int64[np.ndarray, " b"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "TokenIds":
        """Some of the texts."""
        return TokenIds(self.ids[part], self.lengths[part])

    def rows(self, numbers: Int64[np.ndarray, " b"]) -> Int64[Tensor, " b"]:
        """Row numbers where the ids are, sent without waiting for what the device is doing."""
        on_host = torch.from_numpy(numbers)
        return on_host.pin_memory().to(self.ids.device, non_blocking=True) if self.ids.is_cuda else on_host

    def take(self, numbers: Int64[np.ndarray, " b"]) -> "TokenIds":
        """The texts of these rows, in this order."""
        return TokenIds(self.ids[self.rows(numbers)], self.lengths[numbers])


def on_device(ids: Int64[Tensor, "b context"] | TokenIds, tower: nn.Module, device: torch.device) -> Tensor | TokenIds:
    """The ids where the tower is, as it takes them: with their lengths, if these are known and it has use for them."""
    if isinstance(ids, TokenIds):
        return ids if hasattr(tower, "measure") else ids.ids
    if ids.device == device:  # which measures them, if it is the host
        return ids
    return with_lengths(ids.to(device, non_blocking=True), ids, tower)


def with_lengths(
    sent: Int64[Tensor, "b context"], ids: Int64[Tensor, "b context"], tower: nn.Module
) -> Tensor | TokenIds:
    """Ids that were sent to a device, with the lengths that a tower reads off them where they came from."""
    measure = getattr(tower, "measure", None)
    return TokenIds(sent, measure(ids)) if measure and ids.device.type == "cpu" else sent


# What a call of the tower costs beside its tokens, about as much as so many tokens: on a processor the gradients of its
# weights, which are added up once more; on a GPU the starting of its kernels.
CALL_COST = 512
_LEAST_GROUP = 2  # texts, where there are so many: torch.compile compiles a size of 1 apart

Encode = Callable[[Int64[Tensor, "some length"]], Float[Tensor, "some embed"]]


def encode_by_length(
    encode: Encode,
    ids: Int64[Tensor, "b context"] | TokenIds,
    multiple: int | None,
    measure: Callable[[Tensor], Int64[np.ndarray, " b"]],
    one_group: bool = False,
) -> Float[Tensor, "b embed"]:
    """What `encode` makes of the texts in groups of similar length, each cut to its longest, in the texts' own order.

    Args:
        encode: called once for each group.
        ids: if their lengths are not given, they are measured where that needs no waiting, on the host. If they are not
            known, or without a multiple, all texts are as long as they are padded.
        multiple: lengths are rounded up to one of so many tokens, so that a compiled tower meets few shapes.
        measure: the lengths of texts on the host.
        one_group: all texts at the longest of their lengths, in one call.
    """
    if isinstance(ids, Tensor) and multiple is not None and _can_measure(ids):
        ids = TokenIds(ids, measure(ids))
    if isinstance(ids, Tensor) or multiple is None:
        return encode(ids if isinstance(ids, Tensor) else ids.ids)
    padded = np.minimum(-(-ids.lengths // multiple) * multiple, ids.ids.shape[1])
    groups = _groups(padded, one_group)
    if len(groups) == 1:
        return encode(ids.ids[:, : groups[0].length])
    order = np.argsort(padded, kind="stable")
    parts = ids.ids[ids.rows(order)].split([group.texts for group in groups])
    encoded = [encode(part[:, : group.length]) for part, group in zip(parts, groups)]
    return torch.cat(encoded)[ids.rows(np.argsort(order))]


class _Group(NamedTuple):
    length: int
    texts: int


def _groups(padded: Int64[np.ndarray, " b"], one: bool) -> list[_Group]:
    """In the order of their lengths. Few texts join those of the next length, if that is cheaper than a call."""
    lengths, counts = np.unique(padded, return_counts=True)
    groups, padding = [_Group(int(lengths[-1]), int(counts[-1]))], 0
    for length, count in zip(lengths[-2::-1].tolist(), counts[-2::-1].tolist()):
        padding += count * (groups[0].length - length)
        if one or padding <= CALL_COST or groups[0].texts < _LEAST_GROUP:
            groups[0] = _Group(groups[0].length, groups[0].texts + count)
        else:
            groups.insert(0, _Group(length, count))
            padding = 0
    if len(groups) > 1 and groups[0].texts < _LEAST_GROUP:
        shortest, longer, *others = groups
        return [_Group(longer.length, shortest.texts + longer.texts), *others]
    return groups


def _can_measure(ids: Tensor) -> bool:
    """Whether it needs no waiting, and shapes may follow from what is found, as in a graph they may not."""
    return ids.device.type == "cpu" and not torch.compiler.is_compiling()
