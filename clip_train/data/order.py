"""The order of the samples: a pure function from position to (shard, sample).

Epoch e shuffles the shards. The samples, in that order, are cut into `lanes` contiguous segments; inside a lane,
windows of `window` samples are permuted; position p of the epoch is lane `p % lanes`, offset `p // lanes`. So a reader
of one lane touches few shards at a time, and a batch draws from the whole set. Memory is O(shards + lanes * window).
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from clip_train.data.keyed_random import SHARD_ORDER, WINDOW_ORDER, keyed_permutation

Positions = Int64[np.ndarray, " n"]

# To be raised by any change, here or in mixture.py or keyed_random.py, that puts another sample at any position of the
# stream for the same counts, settings and seed: checkpoints carry it, and are not resumed in another order unnoticed.
ORDER_VERSION = 1

_KEPT = 2  # a batch is seldom in more than two epochs, or two windows of each lane


class ShardOrder(NamedTuple):
    """The shards as an epoch goes through them, and where each begins and ends in it."""

    shards: Int64[np.ndarray, " shards"]
    starts: Int64[np.ndarray, " shards"]
    ends: Int64[np.ndarray, " shards"]


class SampleOrder:
    """The infinite sample stream over shards with the given sample counts.

    The windows with one number, of all lanes, are a row. The stream goes through the rows of an epoch one after the
    other, so that the permutations of two of them are all that is kept.

    Args:
        counts: samples in each shard.
        seed: two seeds give two orders.
        lanes: contiguous segments read side by side.
        window: samples of a lane that are shuffled together.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, *, seed: int, lanes: int = 64, window: int = 4096) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        self.seed, self.lanes, self.window = seed, lanes, window
        if self.num_samples == 0 or lanes < 1 or window < 1:
            raise ValueError(f"need samples, lanes and a window, got {self.num_samples}, {lanes} and {window}")
        size, longer = divmod(self.num_samples, lanes)
        # The first lanes hold one sample more, so that `p % lanes` covers the epoch exactly.
        self._lane_starts = np.arange(lanes + 1) * size + np.minimum(np.arange(lanes + 1), longer)
        self._rows_per_epoch = -(-self.num_samples // (lanes * window))
        self._shard_orders: dict[int, ShardOrder] = {}
        self._rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, positions: Positions) -> tuple[Positions, Positions]:
        """The shard and the sample inside it at each position of the stream."""
        shards, samples = np.empty_like(positions), np.empty_like(positions)
        rows, lanes, offsets = self._row_lane_offset(positions)
        for row, members in groups(rows):
            epoch, number = divmod(row, self._rows_per_epoch)
            lane = lanes[members]
            permutations = self._permutations(row, lane)
            inside = permutations[lane, offsets[members] - number * self.window]
            index = self._lane_starts[lane] + number * self.window + inside
            order = self._shard_order(epoch)
            slot = np.searchsorted(order.ends, index, side="right")
            shards[members] = order.shards[slot]
            samples[members] = index - order.starts[slot]
        return shards, samples

    def rank_positions(self, start: int, batch_size: int, rank: int, world_size: int) -> Positions:
        """The positions that one rank takes of the global batch `[start, start + batch_size)`.

        Where the lanes divide over the ranks, a rank takes the lanes congruent to it, so that it reads about 1/W of
        the shards; else a contiguous part. `batch_size` must be a multiple of `world_size`.
        """
        local = batch_size // world_size
        if self.lanes % world_size:
            return np.arange(start + rank * local, start + (rank + 1) * local, dtype=np.int64)
        epoch_start = start // self.num_samples * self.num_samples
        first = start + (rank + epoch_start - start) % world_size
        return np.arange(first, start + batch_size, world_size, dtype=np.int64)

    def shards_at_once(self, world_size: int = 1) -> int:
        """About how many shards a rank reads at a time: those that the windows of its lanes span."""
        lanes = self.lanes if self.lanes % world_size else self.lanes // world_size
        widest = min(self.window, int(self._lane_starts[1]))
        return min(len(self.counts), lanes * (-(-widest * len(self.counts) // self.num_samples) + 1))

    def shards_ahead(
        self, position: int, batch_size: int, ranks: Sequence[int] = (0,), world_size: int = 1
    ) -> Iterator[int]:
        """The shards that these ranks need from `position` on, endlessly, for who fetches them in time.

        A shard comes no later than the first batch that reads it, and once for each lane and epoch that does; all of a
        window's come when its first sample is due. It looks ahead only as far as it is asked to.
        """
        reached = LanesReached(self.lanes)
        for start in count(position, batch_size):
            parts = [self.rank_positions(start, batch_size, rank, world_size) for rank in ranks]
            yield from self.new_shards(np.concatenate(parts), reached)

    def new_shards(self, positions: Positions, reached: "LanesReached") -> Iterator[int]:
        """The shards of the windows at these positions, for those windows that no lane had `reached` before."""
        rows, lanes, _ = self._row_lane_offset(positions)
        new = rows > reached.row[lanes]
        for window in np.unique(rows[new] * self.lanes + lanes[new]).tolist():
            row, lane = divmod(window, self.lanes)
            epoch, number = divmod(row, self._rows_per_epoch)
            order = self._shard_order(epoch)
            first = int(self._lane_starts[lane]) + number * self.window
            last = min(first + self.window, int(self._lane_starts[lane + 1])) - 1
            begin, end = np.searchsorted(order.ends, [first, last], side="right").tolist()
            if reached.row[lane] // self._rows_per_epoch == epoch:  # it may still be in the shard it was in
                begin = max(begin, int(reached.slot[lane]) + 1)
            reached.row[lane], reached.slot[lane] = row, end
            yield from order.shards[begin : end + 1].tolist()

    def _row_lane_offset(self, positions: Positions) -> tuple[Positions, Positions, Positions]:
        """Of each position the row, counted over all epochs, the lane, and the offset in the lane."""
        epochs, inside = np.divmod(positions, self.num_samples)
        offsets, lanes = np.divmod(inside, self.lanes)
        return epochs * self._rows_per_epoch + offsets // self.window, lanes, offsets

    def _permutations(self, row: int, lanes: Positions) -> np.ndarray:
        """Of one row, a permutation per lane; only those of the given lanes are sure to be there."""
        if row not in self._rows:
            widest = min(self.window, int(self._lane_starts[1]))
            _make_room(self._rows)
            self._rows[row] = np.empty((self.lanes, widest), dtype=np.int32), np.zeros(self.lanes, dtype=bool)
        permutations, known = self._rows[row]
        wanted = np.zeros(self.lanes, dtype=bool)
        wanted[lanes] = True
        epoch, number = divmod(row, self._rows_per_epoch)
        for lane in np.flatnonzero(wanted & ~known).tolist():
            lane_size = int(self._lane_starts[lane + 1] - self._lane_starts[lane])
            size = min(self.window, lane_size - number * self.window)
            permutations[lane, :size] = keyed_permutation(WINDOW_ORDER, self.seed, epoch, lane, number, size=size)
            known[lane] = True
        return permutations

    def _shard_order(self, epoch: int) -> ShardOrder:
        order = self._shard_orders.get(epoch)
        if order is None:
            _make_room(self._shard_orders)
            shards = keyed_permutation(SHARD_ORDER, self.seed, epoch, size=len(self.counts))
            ends = np.cumsum(self.counts[shards])
            order = self._shard_orders[epoch] = ShardOrder(shards, ends - self.counts[shards], ends)
        return order


class LanesReached:
    """How far a look ahead has come: in each lane the last row, and the last shard's place in its epoch."""

    def __init__(self, lanes: int) -> None:
        self.row, self.slot = np.full(lanes, -1), np.full(lanes, -1)


def groups(values: Int64[np.ndarray, " n"]) -> Iterator[tuple[int, np.ndarray | slice]]:
    """Each value that occurs, and where. One value, or values in ascending order, are the quick cases."""
    if len(values) and values[0] == values[-1] and (values == values[0]).all():
        yield int(values[0]), slice(None)
    elif len(values):
        by_value = np.argsort(values, kind="stable")
        edges = np.flatnonzero(np.diff(values[by_value])) + 1
        for members in np.split(by_value, edges):
            yield int(values[members[0]]), members


def _make_room(cache: dict) -> None:
    """Let the oldest go."""
    if len(cache) >= _KEPT:
        cache.pop(next(iter(cache)), None)  # another thread may have been here
