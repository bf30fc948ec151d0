import pytest

from clip_train.errors import ConfigError, DataError
from clip_train.shard_tools.bench import (
    BenchOptions,
    forget_files,
    loading_rate,
    numbers_of_workers,
    open_batches,
    reading_rate,
    suggest_workers,
)
from tests.conftest import make_sample
from tests.shard_tools.options import access, options


def bench_options(**changes) -> BenchOptions:
    return options(BenchOptions, "bench", **{"image_size": 16, "batch_size": 8, **changes})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_rates(make_shards, num_workers):
    shards = make_shards([20, 13])
    batches = open_batches(shards, bench_options(), access())
    forget_files(shards, access())
    rate = loading_rate(batches, num_workers, seconds=0.2)
    assert rate.samples_per_second > 0
    assert "decode" in rate.stages
    assert sum(rate.stages.values()) == pytest.approx(1)


def test_reading_counts_the_bytes_of_picture_and_caption(make_shards):
    batches = open_batches(make_shards([8]), bench_options(), access())
    speed, sample_bytes = reading_rate(batches, seconds=0.01)
    samples = [make_sample(number) for number in range(8)]
    assert speed > 0
    assert sample_bytes == sum(len(sample["png"]) + len(sample["txt"]) for sample in samples) / 8


def test_samples_that_cannot_be_used_are_an_error(make_shards):
    batches = open_batches(make_shards([20], lambda sample: {**sample, "png": b"junk"}), bench_options(), access())
    with pytest.raises(DataError, match=r"unusable samples in a row.*clip-shards verify"):
        loading_rate(batches, 0, seconds=0.1)


def test_suggestion():
    rates = {0: 100.0, 1: 90.0, 2: 180.0, 4: 350.0, 8: 360.0}
    assert suggest_workers(rates, 150) == 2
    assert suggest_workers(rates, 80) == 1
    assert suggest_workers({0: 100.0}, 80) == 0
    assert suggest_workers(rates, 361) is None
    assert suggest_workers(rates, None) == 4


def test_numbers_of_workers(monkeypatch):
    monkeypatch.setattr("clip_train.shard_tools.bench.count_workers", lambda _: 6)
    assert numbers_of_workers("auto") == [0, 1, 2, 4, 6]
    assert numbers_of_workers([3, 0]) == [3, 0]
    assert numbers_of_workers(5) == [5]
    for value in ("many", [], [1, -1], [True], ["x"], None):
        with pytest.raises(ConfigError, match="num_workers="):
            numbers_of_workers(value)


@pytest.mark.parametrize("change", [{"image_size": 0}, {"batch_size": 0}, {"seconds": 0}, {"decode": "slow"}])
def test_values_that_cannot_be(change):
    ((name, value),) = change.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        bench_options(**change)
