"""At which rank each query finds what belongs to it, counted a tile of the scores at a time."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clip_train.distributed import agreed, own_part, sum_over_ranks
from clip_train.heartbeat import beat

# Images and texts of a tile: small enough for a processor's cache, or large enough to fill a GPU.
_TILE = {"cpu": (512, 2048), "cuda": (4096, 16384)}


class Ranks(NamedTuple):
    """For each query, how many candidates come before the first one that belongs to it: 0 is a hit at once."""

    image_to_text: Int64[Tensor, " images"]
    text_to_image: Int64[Tensor, " texts"]


class _Targets(NamedTuple):
    """Of each query the best of what belongs to it: its score, and where it stands among the candidates."""

    score: Float[Tensor, " queries"]
    place: Int64[Tensor, " queries"]


@torch.no_grad()
def retrieval_ranks(
    image: Float[Tensor, "images embed"], text: Float[Tensor, "texts embed"], pairs: Int64[Tensor, "pairs 2"]
) -> Ranks:
    """Rank texts for every image and images for every text, each score computed once and none kept.

    An image may belong to several texts and a text to several images: the first of them counts. Where scores are equal,
    the candidate that comes first in the set ranks first; one that is not a number counts against the query. The ranks
    of the process group share the images.

    All tiles are of one shape, the last ones filled up, so that equal vectors have equal scores wherever they stand.

    Args:
        image, text: vectors, the same on every rank.
        pairs: which image (first column) belongs to which text (second column); every image and text is in one.

    Returns:
        The same on every rank.

    Raises:
        DataError: on every rank, if one's memory does not suffice.
    """
    with agreed():
        scores = _Scores(image, text, own_part(len(image)))
        own_scores = _pair_scores(scores, pairs)
    pair_scores = sum_over_ranks(own_scores)
    with agreed():
        to_text, to_image = (_best_of(pairs, pair_scores, side, len(x)) for side, x in enumerate((image, text)))
        after_text = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        after_image = torch.zeros(len(text), dtype=torch.int64, device=image.device)
        for rows, columns, tile in scores.tiles():
            beat()
            after_text[rows] += _count_after(tile, _part(to_text, rows), columns.start)
            after_image[columns] += _count_after(tile.T, _part(to_image, columns), rows.start)
    return Ranks(len(text) - sum_over_ranks(after_text), len(image) - sum_over_ranks(after_image))


class _Scores:
    """The scores of this rank's images and of all texts."""

    def __init__(self, image: Tensor, text: Tensor, own: range) -> None:
        self.image, self.text, self.own = image, text, own
        self.height, self.width = _TILE.get(image.device.type, _TILE["cpu"])
        self._block = image.new_empty(self.height, self.width)

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Which images, which texts, and their scores, which last until the next tile."""
        for first_text in range(0, len(self.text), self.width):
            for first_image in range(self.own.start, self.own.stop, self.height):
                yield self._tile(first_image, first_text)

    def tile_numbers(self, rows: Tensor, columns: Tensor) -> Tensor:
        """In which tile each of these images of this rank meets a text."""
        return (rows - self.own.start) // self.height * -(-len(self.text) // self.width) + columns // self.width

    def tile_of(self, row: int, column: int) -> tuple[slice, slice, Tensor]:
        """The tile in which an image of this rank meets a text."""
        return self._tile(row - (row - self.own.start) % self.height, column - column % self.width)

    def _tile(self, first_image: int, first_text: int) -> tuple[slice, slice, Tensor]:
        rows = slice(first_image, min(first_image + self.height, self.own.stop))
        columns = slice(first_text, min(first_text + self.width, len(self.text)))
        images, texts = _filled(self.image[rows], self.height), _filled(self.text[columns], self.width)
        torch.mm(images, texts.T, out=self._block)
        return rows, columns, self._block[: rows.stop - rows.start, : columns.stop - columns.start]


def _filled(vectors: Tensor, count: int) -> Tensor:
    """So many vectors, zeros after those that there are."""
    missing = count - len(vectors)
    return torch.cat([vectors, vectors.new_zeros(missing, vectors.shape[1])]) if missing else vectors


def _pair_scores(scores: _Scores, pairs: Int64[Tensor, "pairs 2"]) -> Float[Tensor, " pairs"]:
    """What those score that belong together, from the very tiles in which they are compared with others.

    0 where the image is another rank's.
    """
    found = scores.image.new_zeros(len(pairs))
    row, column = pairs.T
    mine = torch.nonzero((row >= scores.own.start) & (row < scores.own.stop))[:, 0]
    tile, order = scores.tile_numbers(row[mine], column[mine]).sort(stable=True)
    mine, edges = mine[order], [0, *tile.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()]
    for first, last in pairwise(edges):
        members = mine[first:last]
        rows, columns, block = scores.tile_of(*pairs[members[0]].tolist())
        found[members] = block[row[members] - rows.start, column[members] - columns.start]
    return found


def _best_of(pairs: Tensor, pair_scores: Tensor, side: int, count: int) -> _Targets:
    """For each image (side 0) or text (side 1): its best partner, the first in the set of equally good ones."""
    query, candidate = pairs[:, side], pairs[:, 1 - side]
    comparable = pair_scores.nan_to_num(nan=-torch.inf)
    score = comparable.new_full((count,), -torch.inf).scatter_reduce(0, query, comparable, "amax")
    candidate = candidate.where(comparable == score[query], torch.iinfo(torch.int64).max)
    place = torch.full_like(query[:1], torch.iinfo(torch.int64).max).expand(count)
    return _Targets(score, place.scatter_reduce(0, query, candidate, "amin"))


def _part(targets: _Targets, part: slice) -> _Targets:
    return _Targets(targets.score[part], targets.place[part])


def _count_after(tile: Float[Tensor, "queries candidates"], targets: _Targets, first: int) -> Int64[Tensor, " queries"]:
    """For each query, how many candidates of a tile, which begins at the candidate `first`, do not come before its own.

    Said by what comes after, so that a score that is not a number counts against the query.
    """
    score, place = targets
    # Of candidates that come later in the set, equal ones are after, too: compare with the next greater number.
    limit = torch.where(place < first, torch.nextafter(score, torch.full_like(score, torch.inf)), score)
    after = (tile < limit[:, None]).sum(dim=1, dtype=torch.int32).long()
    inside = torch.nonzero((place >= first) & (place < first + tile.shape[1]))[:, 0]
    column = torch.arange(first, first + tile.shape[1], device=tile.device)
    equal = (tile[inside] == score[inside, None]) & (column >= place[inside, None])
    return after.index_add_(0, inside, equal.sum(dim=1))
