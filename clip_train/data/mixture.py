"""Several sources in one stream, each with a fixed share of the samples: a pure function from position to sample.

The stream goes in blocks of 4,096 positions. In each, a source has the same number of slots, spread as evenly as can
be, so that every batch has the shares to a sample or two. Every source goes through its own endless stream, in an order
of its own, at its own pace: a small source with a large share comes to its next epoch sooner.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, count

import numpy as np
from jaxtyping import Int64

from clip_train.data.keyed_random import SOURCE_SEED, keyed_bits
from clip_train.data.order import LanesReached, Positions, SampleOrder
from clip_train.errors import ConfigError

BLOCK = 4096


class Mixture:
    """The infinite stream over several sources. It is used as a `SampleOrder` is.

    Args:
        counts: of each source, by name, the samples in each of its shards.
        weights: of each source, its share of the samples; only their ratios matter.
        seed: two seeds give two orders.
        lanes, window: see `SampleOrder`; they hold for each source.

    Raises:
        ConfigError: a source without weight, a weight without source, or one that is not positive or too small.
    """

    def __init__(
        self,
        counts: Mapping[str, Sequence[int] | np.ndarray],
        weights: Mapping[str, float],
        *,
        seed: int,
        lanes: int = 64,
        window: int = 4096,
    ) -> None:
        self.names = list(counts)
        self.seed, self.lanes, self.window = seed, lanes, window
        seeds = [seed] if len(counts) == 1 else [_source_seed(seed, number) for number in range(len(counts))]
        self.sources = [SampleOrder(counts[name], seed=s, lanes=lanes, window=window) for name, s in zip(counts, seeds)]
        self.sizes = np.array([source.num_samples for source in self.sources])
        self.num_samples = int(self.sizes.sum())
        self.slots = np.array(_slots(self.names, weights))
        self._source_of_slot, self._rank_of_slot = _spread(self.slots)
        # Shards are numbered through, source after source.
        self._first_shard = list(accumulate((len(source.counts) for source in self.sources), initial=0))

    def locate(self, positions: Positions) -> tuple[Positions, Positions]:
        """The shard, numbered over all sources, and the sample inside it at each position of the stream."""
        shards, samples = np.empty_like(positions), np.empty_like(positions)
        sources, inner = self._resolve(positions)
        for number, source in enumerate(self.sources):
            members = np.flatnonzero(sources == number)
            inner_shards, samples[members] = source.locate(inner[members])
            shards[members] = inner_shards + self._first_shard[number]
        return shards, samples

    def source_of(self, positions: Positions) -> Positions:
        """The number of the source at each position."""
        return self._resolve(positions)[0]

    def epochs(self, position: int) -> list[float]:
        """How often the stream has gone through each source when it comes to a position."""
        block, slot = divmod(position, BLOCK)
        in_block = np.bincount(self._source_of_slot[:slot], minlength=len(self.sources))
        return ((block * self.slots + in_block) / self.sizes).tolist()

    def rank_positions(self, start: int, batch_size: int, rank: int, world_size: int) -> Positions:
        """The positions that one rank takes of the global batch `[start, start + batch_size)`.

        Where the lanes divide over the ranks, a rank takes the lanes congruent to it, of every source. These are not
        quite equally many in every batch: what is left over goes to a neighbouring rank, so that a rank also reads of
        the lanes next to its own. `batch_size` must be a multiple of `world_size`.
        """
        return np.sort(self._rank_parts(start, batch_size, world_size)[rank])

    def shards_at_once(self, world_size: int = 1) -> int:
        """About how many shards a rank reads at a time, those of the lanes next to its own among them."""
        own = sum(source.shards_at_once(world_size) for source in self.sources)
        return own if world_size == 1 else min(2 * own, self._first_shard[-1])

    def shards_ahead(
        self, position: int, batch_size: int, ranks: Sequence[int] = (0,), world_size: int = 1
    ) -> Iterator[int]:
        """The shards that these ranks need from `position` on, endlessly; see `SampleOrder.shards_ahead`."""
        reached = [LanesReached(self.lanes) for _ in self.sources]
        for start in count(position, batch_size):
            parts = self._rank_parts(start, batch_size, world_size)[list(ranks)]
            sources, inner = self._resolve(np.sort(parts, axis=None))
            for number, source in enumerate(self.sources):
                for shard in source.new_shards(inner[sources == number], reached[number]):
                    yield shard + self._first_shard[number]

    def _rank_parts(self, start: int, batch_size: int, world_size: int) -> Int64[np.ndarray, "ranks local"]:
        """The positions of a global batch, cut up among the ranks."""
        if len(self.sources) == 1 or self.lanes % world_size:
            first = self.sources[0]
            return np.stack([first.rank_positions(start, batch_size, rank, world_size) for rank in range(world_size)])
        positions = np.arange(start, start + batch_size, dtype=np.int64)
        sources, inner = self._resolve(positions)
        lanes = inner % self.sizes[sources] % self.lanes
        by_rank = np.arange(self.lanes).reshape(-1, world_size).T.ravel()  # the lanes, one rank's after another's
        place = np.argsort(by_rank).astype(np.min_scalar_type(self.lanes))  # short numbers are sorted faster
        by_lane = np.argsort(place[lanes], kind="stable")
        return positions[by_lane].reshape(world_size, -1)

    def _resolve(self, positions: Positions) -> tuple[Positions, Positions]:
        """Of each position the source, and the position in that source's own stream."""
        blocks, slots = np.divmod(positions, BLOCK)
        sources = self._source_of_slot[slots]
        return sources, blocks * self.slots[sources] + self._rank_of_slot[slots]


def _spread(slots: Int64[np.ndarray, " sources"]) -> tuple[Positions, Positions]:
    """Of each slot of a block the source, and how many of that source's slots come before it."""
    sources = np.repeat(np.arange(len(slots)), slots)
    ranks = np.arange(BLOCK) - np.repeat(np.cumsum(slots) - slots, slots)
    evenly = np.argsort((ranks + 0.5) / slots[sources], kind="stable")
    return sources[evenly], ranks[evenly]


def _source_seed(seed: int, number: int) -> int:
    return int(keyed_bits(SOURCE_SEED, seed, number, count=1)[0])


def _slots(names: Sequence[str], weights: Mapping[str, float]) -> list[int]:
    """A block's slots of each source, in proportion to the weights, by largest remainder."""
    if set(names) != set(weights):
        raise ConfigError(f"data.train.weights has {', '.join(weights)}; the sources are {', '.join(names)}")
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(f"data.train.weights: {name} has the weight {weight}, which is not a positive number")
    total = sum(weights.values())
    shares = [BLOCK * weights[name] / total for name in names]
    slots = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(names)), key=lambda i: slots[i] - shares[i])
    for i in by_remainder[: BLOCK - sum(slots)]:
        slots[i] += 1
    for name, share, n in zip(names, shares, slots):
        if n == 0:
            least = f"the least that can be mixed in is 1/{BLOCK} = {1 / BLOCK:.3g}"
            raise ConfigError(f"data.train.weights: {name} has a share of {share / BLOCK:.3g} of the samples; {least}")
    return slots
