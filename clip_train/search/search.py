"""The nearest samples to a vector: candidates from the index, scored exactly, filtered, and without near-copies."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from clip_train.embedding.folder import EmbeddingFolder
from clip_train.errors import ConfigError, DataError
from clip_train.search.filters import MetadataFilter
from clip_train.search.index import IndexAbout, read_index, search_parameters

_CANDIDATES, _MOST_CANDIDATES = 256, 100_000  # to be scored exactly
_MOST_EFFORT = 16  # times the usual one, before all samples are compared
_EXACT_UP_TO = 20_000  # samples: to compare with all of them is fast


class Hit(NamedTuple):
    """A sample that was found.

    Attributes:
        number: in the folder.
        score: cosine.
        row: its metadata.
    """

    number: int
    score: float
    row: dict[str, Any]


@dataclass(frozen=True)
class SearchOptions:
    """What is wanted.

    Attributes:
        num_results: at most so many.
        where: condition on the metadata; None for none.
        deduplicate: leave out what has at least this cosine to a better hit, among the nearest 100,000 at most; None
            leaves all in.

    Raises:
        ConfigError: a value cannot be used.
    """

    num_results: int
    where: str | None = None
    deduplicate: float | None = None

    def __post_init__(self) -> None:
        if self.num_results < 1:
            raise ConfigError(f"num_results={self.num_results} is not a whole number of at least 1")
        if self.deduplicate is not None and not 0 < self.deduplicate <= 1:
            raise ConfigError(f"deduplicate={self.deduplicate:g} is no cosine above 0 and up to 1")


@dataclass(frozen=True)
class Searcher:
    """Searches one side of a folder: its images or its texts.

    Attributes:
        exact_up_to: no more samples than this, in all or by a condition, are all compared, without the index.
    """

    folder: EmbeddingFolder
    side: str
    exact_up_to: int = _EXACT_UP_TO

    def __post_init__(self) -> None:
        if self.side not in self.folder.embeddings:
            there = " and ".join(f"{side}s" for side in self.folder.embeddings)
            raise ConfigError(f"target={self.side}: embeddings={self.folder.path} has {there} only")

    @cached_property
    def index(self) -> tuple[Any, IndexAbout]:
        """FAISS's, and what it is. Raises DataError."""
        return read_index(self.folder, self.side)

    def check_ready(self) -> None:
        """Raises DataError if there are no samples, or no index and too many to do without."""
        if not len(self.folder):
            raise DataError(f"embeddings={self.folder.path} has no samples")
        if len(self.folder) > self.exact_up_to:
            _ = self.index

    @cached_property
    def allowed(self) -> MetadataFilter:
        """For each sample whether it meets a condition. Raises ConfigError."""
        return MetadataFilter(self.folder)

    def search(self, vector: Float[np.ndarray, " width"], options: SearchOptions) -> list[Hit]:
        """The samples nearest to a unit vector, best first; of equal ones that which comes first in the folder.

        Raises:
            ConfigError: the condition cannot be used.
            DataError: there is no index.
        """
        if len(vector) != self.folder.width(self.side):
            width = self.folder.width(self.side)
            raise ConfigError(f"weights: embeddings of {len(vector)} numbers, those of the folder have {width}")
        allowed = self.allowed(options.where) if options.where else None
        numbers, scores = np.empty(0, np.int64), np.empty(0, np.float32)
        for candidates, is_all in self._candidates(vector, options.num_results, allowed):
            vectors = self.folder.vectors(self.side, candidates)
            scores = vectors @ vector
            order = np.lexsort((candidates, -scores))
            numbers, scores, vectors = candidates[order], scores[order], vectors[order]
            if options.deduplicate is not None:
                kept = _distinct(vectors, options.deduplicate, options.num_results)
                numbers, scores = numbers[kept], scores[kept]
            if is_all or len(numbers) >= options.num_results:
                break
        numbers, scores = numbers[: options.num_results], scores[: options.num_results]
        rows = self.folder.rows(numbers)
        return [Hit(number, score, row) for number, score, row in zip(numbers.tolist(), scores.tolist(), rows)]

    def _candidates(
        self, vector: np.ndarray, wanted: int, allowed: np.ndarray | None
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """More and more of the samples that may be nearest, and whether these are as many as are looked at."""
        there = len(self.folder) if allowed is None else int(allowed.sum())
        if there <= self.exact_up_to:
            yield (np.arange(there) if allowed is None else np.flatnonzero(allowed)), True
            return
        index, about = self.index
        count, effort = max(_CANDIDATES, 4 * wanted), 1
        while count < there and effort <= _MOST_EFFORT:
            parameters = search_parameters(about, count, allowed, effort)
            _, found = index.search(vector[None].astype(np.float32), count, params=parameters)
            if found[0][-1] >= 0:  # else what was looked through holds too few that are allowed
                yield found[0], False
                count *= 4
            effort *= 4
        yield self._nearest(vector, min(there, max(count, _MOST_CANDIDATES)), allowed), True

    def _nearest(self, vector: np.ndarray, count: int, allowed: np.ndarray | None) -> np.ndarray:
        """The nearest samples, found by comparing all."""
        numbers, scores, start = np.empty(0, np.int64), np.empty(0, np.float32), 0
        for block in self.folder.blocks(self.side):
            own = np.arange(start, start + len(block))
            start += len(block)
            if allowed is not None:
                block, own = block[allowed[own]], own[allowed[own]]
            numbers, scores = np.concatenate([numbers, own]), np.concatenate([scores, block @ vector])
            best = np.lexsort((numbers, -scores))[:count]
            numbers, scores = numbers[best], scores[best]
        return numbers


def _distinct(vectors: Float[np.ndarray, "n width"], threshold: float, wanted: int) -> list[int]:
    """Which vectors to keep, in their order, so that no two kept ones have the cosine `threshold` or more."""
    kept: list[int] = []
    for number, vector in enumerate(vectors):
        if len(kept) == wanted:
            break
        if not kept or float((vectors[kept] @ vector).max()) < threshold:
            kept.append(number)
    return kept
