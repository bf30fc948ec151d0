"""The order of the samples: a pure function from position to (shard, sample).

Epoch e shuffles the shards. The samples, in that order, are cut into `lanes` contiguous segments; inside a lane,
windows of `window` samples are permuted; position p of the epoch is lane `p % lanes`, offset `p // lanes`. So a reader
of one lane touches few shards at a time, and a batch draws from the whole set. Memory is O(shards + lanes * window).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from clip_train.data.keyed_random import SHARD_ORDER, WINDOW_ORDER, keyed_permutation

Positions = Int64[np.ndarray, " n"]


class SampleOrder:
    """The infinite sample stream over shards with the given sample counts.

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
        self._shard_orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int, int], np.ndarray] = {}

    def locate(self, positions: Positions) -> tuple[Positions, Positions]:
        """The shard and the sample inside it at each position of the stream."""
        shards, samples = np.empty_like(positions), np.empty_like(positions)
        epochs = positions // self.num_samples
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            index = self._shuffled_index(int(epoch), positions[chosen] - epoch * self.num_samples)
            order, ends = self._shard_order(int(epoch))
            slot = np.searchsorted(ends, index, side="right")
            shards[chosen] = order[slot]
            samples[chosen] = index - (ends[slot] - self.counts[order[slot]])
        return shards, samples

    def _shuffled_index(self, epoch: int, positions: Positions) -> Positions:
        """Position in the epoch -> index into the epoch's concatenated shards."""
        lane, offset = positions % self.lanes, positions // self.lanes
        window, inside = offset // self.window, offset % self.window
        index = np.empty_like(positions)
        windows_per_lane = int(window.max(initial=0)) + 1
        groups, group_of = np.unique(lane * windows_per_lane + window, return_inverse=True)
        for number, group in enumerate(groups):
            members = group_of == number
            group_lane, group_window = divmod(int(group), windows_per_lane)
            permutation = self._window_permutation(epoch, group_lane, group_window)
            first = self._lane_start(group_lane) + group_window * self.window
            index[members] = first + permutation[inside[members]]
        return index

    def _lane_start(self, lane: int) -> int:
        """The first `num_samples % lanes` lanes hold one sample more, so that `p % lanes` covers the epoch exactly."""
        size, longer = divmod(self.num_samples, self.lanes)
        return lane * size + min(lane, longer)

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._shard_orders:
            if len(self._shard_orders) >= 2:  # a batch spans at most a few epochs; keep the newest
                self._shard_orders.clear()
            order = keyed_permutation(SHARD_ORDER, self.seed, epoch, size=len(self.counts))
            self._shard_orders[epoch] = order, np.cumsum(self.counts[order])
        return self._shard_orders[epoch]

    def _window_permutation(self, epoch: int, lane: int, window: int) -> np.ndarray:
        key = (epoch, lane, window)
        if key not in self._windows:
            if len(self._windows) >= 2 * self.lanes:
                self._windows.clear()
            lane_size = self._lane_start(lane + 1) - self._lane_start(lane)
            size = min(self.window, lane_size - window * self.window)
            self._windows[key] = keyed_permutation(WINDOW_ORDER, self.seed, *key, size=size).astype(np.int32)
        return self._windows[key]

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
