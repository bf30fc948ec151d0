import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_train.data.mixture import BLOCK, Mixture
from clip_train.data.order import SampleOrder
from clip_train.errors import ConfigError

COUNTS = {"a": [700, 400, 900], "b": [300, 200], "c": [50]}
WEIGHTS = {"a": 7, "b": 2.5, "c": 0.5}

sizes = st.lists(st.lists(st.integers(20, 60), min_size=1, max_size=4), min_size=1, max_size=4)
lanes = st.integers(1, 12)
world_sizes = st.sampled_from([1, 2, 3, 4])


def mixture(seed: int = 0, **settings) -> Mixture:
    return Mixture(COUNTS, WEIGHTS, seed=seed, **settings)


def invented(sizes: list[list[int]], **settings) -> Mixture:
    """Sources with weights 1, 2, 3, ..."""
    counts = {f"source{number}": counts for number, counts in enumerate(sizes)}
    return Mixture(counts, {name: number + 1 for number, name in enumerate(counts)}, **settings)


def stream(mixed: Mixture | SampleOrder, start: int, stop: int) -> list[tuple[int, int]]:
    shards, samples = mixed.locate(np.arange(start, stop))
    return list(zip(shards.tolist(), samples.tolist()))


def test_each_block_has_the_exact_shares():
    sources = mixture().source_of(np.arange(5 * BLOCK)).reshape(5, BLOCK)
    for block in sources:
        assert np.bincount(block).tolist() == [2867, 1024, 205]  # 70 %, 25 % and 5 % of 4,096


@given(st.integers(0, 10 * BLOCK), st.integers(1, 10_000))
def test_each_batch_has_the_shares_nearly(start, size):
    taken = np.bincount(mixture().source_of(np.arange(start, start + size)), minlength=3)
    assert abs(taken - size * np.array([2867, 1024, 205]) / BLOCK).max() < 2


@given(st.lists(st.floats(1, 100), min_size=1, max_size=8))
def test_shares_are_as_close_as_slots_allow(weights):
    named = {str(number): weight for number, weight in enumerate(weights)}
    mixed = Mixture({name: [5] for name in named}, named, seed=0)
    shares = np.array(weights) / sum(weights)
    assert mixed.slots.sum() == BLOCK
    assert (abs(mixed.slots - BLOCK * shares) < 1).all()


def test_only_the_ratios_of_weights_matter():
    scaled = Mixture(COUNTS, {name: weight * 10 for name, weight in WEIGHTS.items()}, seed=0)
    assert stream(mixture(), 0, 5000) == stream(scaled, 0, 5000)


@given(sizes, lanes)
def test_every_source_goes_through_its_samples_epoch_by_epoch(sizes, lanes):
    mixed = invented(sizes, seed=1, lanes=lanes, window=7)
    positions = np.arange(BLOCK - 500, BLOCK + 500)
    sources, (shards, samples) = mixed.source_of(positions), mixed.locate(positions)
    first_shard = 0
    for number, counts in enumerate(sizes):
        own = sources == number
        seen = list(zip((shards[own] - first_shard).tolist(), samples[own].tolist()))
        whole = [(shard, i) for shard, count in enumerate(counts) for i in range(count)]
        begun = round(mixed.epochs(int(positions[0]))[number] * len(whole)) % len(whole)
        for start in range(-begun % len(whole), len(seen) - len(whole) + 1, len(whole)):
            assert sorted(seen[start : start + len(whole)]) == whole
        first_shard += len(counts)


@given(sizes, st.integers(0, 1000), st.integers(1, 60))
def test_order_does_not_depend_on_where_one_starts(sizes, start, length):
    first = BLOCK - 500
    whole = stream(invented(sizes, seed=1, lanes=4, window=7), first, first + start + length)
    assert stream(invented(sizes, seed=1, lanes=4, window=7), first + start, first + start + length) == whole[start:]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), lanes, world_sizes, st.integers(0, 200))
def test_one_source_is_the_plain_order(counts, lanes, world_size, step):
    plain = SampleOrder(counts, seed=5, lanes=lanes, window=7)
    mixed = Mixture({"only": counts}, {"only": 0.3}, seed=5, lanes=lanes, window=7)
    start, size = step * 3 * world_size, 3 * world_size
    assert stream(mixed, start, start + size) == stream(plain, start, start + size)
    for rank in range(world_size):
        own = mixed.rank_positions(start, size, rank, world_size)
        assert np.array_equal(own, plain.rank_positions(start, size, rank, world_size))


def test_seeds_and_sources_differ():
    assert stream(mixture(), 0, 200) != stream(mixture(seed=1), 0, 200)
    twins = Mixture({"a": [1000], "b": [1000]}, {"a": 1, "b": 1}, seed=0)
    sources, (_, samples) = twins.source_of(np.arange(400)), twins.locate(np.arange(400))
    assert samples[sources == 0][:100].tolist() != samples[sources == 1][:100].tolist()


def test_the_order_never_changes():
    # A resumed run of an earlier release must go on with the same samples: this order is a promise.
    mixed = Mixture({"a": [5, 3, 4], "b": [6]}, {"a": 2, "b": 1}, seed=3, lanes=3, window=2)
    assert mixed.source_of(np.arange(12)).tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert stream(mixed, 8190, 8196) == [(3, 4), (2, 0), (1, 0), (3, 0), (0, 1), (0, 4)]


@given(sizes, lanes, world_sizes, st.integers(1, 20), st.integers(0, 300))
def test_ranks_share_each_global_batch(sizes, lanes, world_size, local, step):
    mixed, size = invented(sizes, seed=1, lanes=lanes, window=7), local * world_size
    parts = [mixed.rank_positions(step * size, size, rank, world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [local] * world_size
    assert sorted(np.concatenate(parts).tolist()) == list(range(step * size, (step + 1) * size))


def test_a_rank_reads_its_lanes_and_a_little_of_the_next_ones():
    counts = {"a": [10] * 6400, "b": [10] * 3200}
    mixed = Mixture(counts, {"a": 2, "b": 1}, seed=0, lanes=64, window=10)
    touched = []
    for rank in range(8):
        parts = [mixed.rank_positions(step * 512, 512, rank, 8) for step in range(187)]  # one epoch of each source
        touched.append(len(np.unique(mixed.locate(np.concatenate(parts))[0])))
    assert max(touched) < 1.3 * 9600 / 8


@given(sizes, lanes, world_sizes, st.data())
def test_shards_come_before_the_batch_that_reads_them(sizes, lanes, world_size, data):
    ranks = data.draw(st.lists(st.integers(0, world_size - 1), min_size=1, unique=True))
    size, start = 10 * world_size, data.draw(st.integers(0, 5000))
    mixed = invented(sizes, seed=1, lanes=lanes, window=7)
    ahead, there, taken = mixed.shards_ahead(start, size, ranks, world_size), set(), 0
    for step in range(20):
        begin = start + step * size
        parts = [mixed.rank_positions(begin, size, rank, world_size) for rank in ranks]
        needed = set(mixed.locate(np.concatenate(parts))[0].tolist())
        epochs = [int(b) - int(a) + 1 for a, b in zip(mixed.epochs(start), mixed.epochs(begin + size))]
        most = sum(n * (len(counts) + lanes) for n, counts in zip(epochs, sizes))
        while not needed <= there:
            there.add(next(ahead))
            taken += 1
            assert taken <= most


def test_shards_at_once_are_those_of_all_sources():
    mixed = Mixture({"a": [100] * 640, "b": [100] * 64}, {"a": 1, "b": 1}, seed=0, lanes=64, window=100)
    assert mixed.shards_at_once() == 128 + 64  # b has a shard to a lane
    for rank in range(4):
        positions = np.concatenate([mixed.rank_positions(start, 64, rank, 4) for start in range(0, 6400, 64)])
        assert len(set(mixed.locate(positions)[0].tolist())) <= mixed.shards_at_once(4) == 128


def test_epochs_of_each_source():
    mixed = mixture()
    assert mixed.epochs(0) == [0, 0, 0]
    assert mixed.epochs(BLOCK) == [2867 / 2000, 1024 / 500, 205 / 50]
    counts = np.bincount(mixed.source_of(np.arange(BLOCK + 100)))
    assert mixed.epochs(BLOCK + 100) == (counts / [2000, 500, 50]).tolist()


def test_memory_does_not_grow_with_the_samples():
    counts = {"a": np.full(30_000, 10_000), "b": np.full(10_000, 10_000)}
    tracemalloc.start()
    try:
        mixed = Mixture(counts, {"a": 1, "b": 2}, seed=0)
        for start in range(123_456_789, 400_000_000, 90_000_000):
            mixed.locate(mixed.rank_positions(start, 65_536, 3, 8))
        next(mixed.shards_ahead(345_678_901, 4096))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20  # a permutation of the samples would take 3,200 MB


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "b": 0}, "b has the weight 0, which is not a positive number"),
        ({"a": 1, "b": -2}, "not a positive number"),
        ({"a": 1, "b": float("inf")}, "not a positive number"),
        ({"a": 1, "b": "many"}, "not a positive number"),
        ({"a": 1}, "data.train.weights has a; the sources are a, b"),
        ({"a": 1, "b": 1, "c": 1}, "has a, b, c; the sources are a, b"),
        ({"a": 1, "b": 1e-4}, "b has a share of 0.0001 of the samples; the least that can be mixed in is 1/4096"),
    ],
)
def test_weights_that_cannot_be_used(weights, message):
    with pytest.raises(ConfigError, match=message):
        Mixture({"a": [5], "b": [5]}, weights, seed=0)
