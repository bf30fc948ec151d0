import tracemalloc
from collections import Counter, OrderedDict
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_train.data.order import SampleOrder

counts = st.lists(st.integers(1, 30), min_size=1, max_size=8)
lanes = st.integers(1, 12)
windows = st.integers(1, 10)
world_sizes = st.sampled_from([1, 2, 3, 4])


def stream(order: SampleOrder, start: int, stop: int) -> list[tuple[int, int]]:
    shards, samples = order.locate(np.arange(start, stop))
    return list(zip(shards.tolist(), samples.tolist()))


@given(counts, lanes, windows, st.integers(0, 3))
def test_every_sample_once_per_epoch(counts, lanes, window, epoch):
    order = SampleOrder(counts, seed=1, lanes=lanes, window=window)
    total = sum(counts)
    seen = stream(order, epoch * total, (epoch + 1) * total)
    assert sorted(seen) == [(shard, i) for shard, count in enumerate(counts) for i in range(count)]


@given(counts, lanes, windows, st.integers(0, 200), st.integers(1, 60))
def test_order_does_not_depend_on_where_one_starts(counts, lanes, window, start, length):
    order = SampleOrder(counts, seed=1, lanes=lanes, window=window)
    whole = stream(order, 0, start + length)
    assert stream(SampleOrder(counts, seed=1, lanes=lanes, window=window), start, start + length) == whole[start:]


@given(counts, lanes, world_sizes, st.integers(1, 5), st.integers(0, 100))
def test_ranks_share_each_global_batch(counts, lanes, world_size, local, step):
    order = SampleOrder(counts, seed=1, lanes=lanes, window=4)
    size = local * world_size
    parts = [order.rank_positions(step * size, size, rank, world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [local] * world_size
    assert sorted(np.concatenate(parts).tolist()) == list(range(step * size, (step + 1) * size))


def test_a_rank_reads_its_share_of_the_shards():
    order = SampleOrder([100] * 64, seed=0, lanes=64, window=50)
    for rank in range(4):
        touched = Counter()
        for step in range(10):
            positions = order.rank_positions(step * 640, 640, rank, 4)
            touched.update(order.locate(positions)[0].tolist())
        assert len(touched) == 16


def test_seeds_and_epochs_differ():
    first = SampleOrder([50, 50], seed=0)
    assert stream(first, 0, 100) != stream(SampleOrder([50, 50], seed=1), 0, 100)
    assert stream(first, 0, 100) != stream(first, 100, 200)


def test_the_order_never_changes():
    # A resumed run of an earlier release must go on with the same samples: this order is a promise.
    order = SampleOrder([5, 3, 4], seed=3, lanes=3, window=2)
    assert stream(order, 0, 12) == [
        (0, 0),
        (0, 4),
        (2, 0),
        (0, 1),
        (1, 0),
        (2, 1),
        (0, 3),
        (1, 2),
        (2, 2),
        (0, 2),
        (1, 1),
        (2, 3),
    ]


def test_batches_are_drawn_from_everywhere():
    order = SampleOrder([1000] * 10, seed=0, lanes=64, window=4096)
    shards, _ = order.locate(np.arange(512))
    assert len(set(shards.tolist())) == 10


@given(counts, lanes, windows, st.lists(st.integers(0, 250), max_size=50))
def test_positions_may_come_in_any_order(counts, lanes, window, positions):
    order = SampleOrder(counts, seed=1, lanes=lanes, window=window)
    whole = stream(SampleOrder(counts, seed=1, lanes=lanes, window=window), 0, 251)
    shards, samples = order.locate(np.array(positions, dtype=np.int64))
    assert list(zip(shards.tolist(), samples.tolist())) == [whole[position] for position in positions]


@given(counts, lanes, windows, world_sizes, st.data())
def test_shards_come_before_the_batch_that_reads_them(counts, lanes, window, world_size, data):
    ranks = data.draw(st.lists(st.integers(0, world_size - 1), min_size=1, unique=True))
    size, start = 2 * world_size, data.draw(st.integers(0, 100))
    order = SampleOrder(counts, seed=1, lanes=lanes, window=window)
    ahead, there, taken = order.shards_ahead(start, size, ranks, world_size), set(), 0
    for step in range(3 * sum(counts) // size + 1):
        begin = start + step * size
        parts = [order.rank_positions(begin, size, rank, world_size) for rank in ranks]
        needed = set(order.locate(np.concatenate(parts))[0].tolist())
        epochs = (begin + size - 1) // sum(counts) - start // sum(counts) + 1
        while not needed <= there:
            there.add(next(ahead))
            taken += 1
            assert taken <= epochs * (len(counts) + lanes)


def test_shards_ahead_are_those_of_the_ranks_in_the_order_of_need():
    order = SampleOrder([100] * 64, seed=0, lanes=16, window=50)
    ranks = (4, 5)  # a lane each, of four shards
    ahead = list(islice(order.shards_ahead(0, 640, ranks, 16), 8))
    read = order.locate(np.concatenate([order.rank_positions(0, 6400, rank, 16) for rank in ranks]))[0]
    assert sorted(ahead) == sorted(set(read.tolist()))
    late = list(islice(order.shards_ahead(3200, 640, ranks, 16), 2))
    assert late == ahead[4:6]


def opened(order: SampleOrder, kept: int, world_size: int) -> int:
    """How often one rank opens a shard in an epoch, when the `kept` that it used last stay open."""
    recent: OrderedDict[int, None] = OrderedDict()
    times = 0
    for start in range(0, order.num_samples, 8 * world_size):
        for shard in order.locate(order.rank_positions(start, 8 * world_size, 0, world_size))[0].tolist():
            times += shard not in recent
            recent[shard] = None
            recent.move_to_end(shard)
            if len(recent) > kept:
                recent.popitem(last=False)
    return times


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("lanes", "window"), [(8, 10), (64, 20), (64, 70), (640, 5)])
def test_with_shards_at_once_kept_open_each_is_opened_once_for_each_lane(lanes, window, world_size):
    order = SampleOrder([20] * 1600, seed=0, lanes=lanes, window=window)
    kept = order.shards_at_once(world_size)
    assert kept <= lanes // world_size * (window // 20 + 3)
    assert opened(order, kept, world_size) <= (1600 + 2 * lanes) / world_size


def test_memory_does_not_grow_with_the_samples():
    counts = np.full(40_000, 10_000)
    tracemalloc.start()
    try:
        order = SampleOrder(counts, seed=0)
        for start in (123_456_789, 234_567_890, 399_999_999):
            order.locate(order.rank_positions(start, 4096, 3, 8))
        next(order.shards_ahead(345_678_901, 4096))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20  # a permutation of the samples would take 3,200 MB


def test_nothing_to_order_is_an_error():
    with pytest.raises(ValueError, match="need samples"):
        SampleOrder([], seed=0)
