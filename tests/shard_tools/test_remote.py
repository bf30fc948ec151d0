"""Remote shards: every tool does with them what it does with local ones."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_train.data import retries
from clip_train.data.shard_cache import CacheError
from clip_train.errors import DataError
from clip_train.shard_tools.bench import BenchOptions, fetch, forget_files, loading_rate, open_batches, reading_rate
from clip_train.shard_tools.indexing import build_indexes
from clip_train.shard_tools.sheets import draw_samples
from clip_train.shard_tools.stats import measure_shards, summarize
from clip_train.shard_tools.verify import verify_shards
from tests.data.failing_server import FailingServer, Fault, failing_server
from tests.data.s3_server import s3_server
from tests.shard_tools.options import access, options, select


@pytest.fixture
def server(monkeypatch) -> Iterator[FailingServer]:
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.01)
    with failing_server() as server:
        yield server


@pytest.fixture
def local(make_shards) -> list[str]:
    def damage(sample: dict) -> dict:
        return sample | ({"png": b"junk"} if sample["__key__"] == "000004" else {})

    return make_shards([5, 4, 6], damage)


@pytest.fixture
def urls(server, local) -> list[str]:
    return [server.add(f"/{Path(shard).name}", Path(shard).read_bytes()) for shard in local]


@pytest.fixture
def reach(tmp_path):
    """Access with a cache of its own."""
    return access(cache_dir=str(tmp_path / "cache"), retries=2, timeout=10)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_is_found_is_what_is_found_in_local_ones(local, urls, reach, num_workers):
    expected = verify_shards(local, select(), access(), num_workers)
    found = verify_shards(urls, select(), reach, num_workers)
    assert (found.num_samples, found.num_checked, found.num_bytes) == (15, 15, expected.num_bytes)
    assert [(damage.place, *damage[2:]) for damage in found.damages] == [
        (urls[0], *damage[2:]) for damage in expected.damages
    ]
    here, there = (
        summarize(measure_shards(shards, select(), how, num_workers))
        for shards, how in ((local, access()), (urls, reach))
    )
    assert here == there


def test_s3_and_pipes(local, reach):
    with s3_server() as client:
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="0.tar", Body=Path(local[1]).read_bytes())
        found = verify_shards(["s3://bucket/0.tar", f"pipe:cat {local[2]}"], select(), reach, num_workers=1)
    assert (found.num_shards, found.num_samples, found.damages) == (2, 10, [])


def test_indexes_are_kept_where_training_looks_for_them(server, urls, reach):
    indexes = list(build_indexes(urls, reach, num_workers=2))
    assert {index.shard: index.num_samples for index in indexes} == dict(zip(urls, (5, 4, 6)))
    assert all(index.is_kept for index in indexes)
    server.requests.clear()
    assert sum(index.num_samples for index in build_indexes(urls, reach, num_workers=1)) == 15
    assert server.requests == []


def test_a_cache_that_holds_one_shard_is_enough(server, local, urls, tmp_path):
    size = max(Path(shard).stat().st_size for shard in local)
    reach = access(cache_dir=str(tmp_path / "cache"), cache_size=size)
    measured = measure_shards(urls, select(), reach, num_workers=2)
    draw_samples(tmp_path / "samples.png", measured, select(), "title")
    assert summarize(measured)["shard_bytes"] == sum(Path(shard).stat().st_size for shard in local)
    assert len(list((tmp_path / "cache" / "staged").glob("*.tar"))) == 1


def test_failures_that_pass_do_no_harm(server, urls, reach):
    for url in urls:
        server.faults[url[-10:]] = [Fault(503), Fault(after=5000)]
    assert verify_shards(urls, select(), reach, num_workers=1).num_checked == 15


def test_a_shard_that_cannot_be_had_is_a_damage_of_its_own(server, urls, reach):
    server.faults["/00001.tar"] = [Fault(500)] * 9
    server.add("/00003.tar", b"<html>not found" * 100)
    found = verify_shards([*urls, server.url + "/none.tar", server.url + "/00003.tar"], select(), reach, num_workers=1)
    reasons = {damage.place[len(server.url) :]: damage.detail for damage in found.damages if not damage.key}
    assert list(reasons) == ["/00001.tar", "/none.tar", "/00003.tar"]
    assert "given up after 3 attempts: 500" in reasons["/00001.tar"]
    assert "it does not exist" in reasons["/none.tar"]
    assert reasons["/00003.tar"] == f"shard {server.url}/00003.tar is not a tar file"
    assert found.num_checked == 11
    with pytest.raises(DataError, match=r"none.tar: it does not exist \(clip-shards verify"):
        measure_shards([server.url + "/none.tar"], select(), reach, num_workers=1)


def test_a_cache_that_cannot_take_copies_is_no_damage(urls, tmp_path):
    with pytest.raises(CacheError, match=r" limit cache_size=1 KB: raise that"):
        verify_shards(urls, select(), access(cache_dir=str(tmp_path / "cache"), cache_size="1KB"), num_workers=1)
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"^cache_dir=.*file cannot be used"):
        verify_shards(urls, select(), access(cache_dir=str(tmp_path / "file")), num_workers=2)


def bench_options(**changes) -> BenchOptions:
    return options(BenchOptions, "bench", **{"image_size": 16, "batch_size": 4, **changes})


def test_bench_copies_first(server, local, urls, reach):
    fetched = fetch([*urls[1:], local[0]], reach, seconds=30)
    assert fetched.shards == [*urls[1:], local[0]]
    assert fetched.num_downloads == 2
    assert fetched.num_bytes == sum(Path(shard).stat().st_size for shard in local[1:])
    assert fetch(urls[1:], reach, seconds=30).num_downloads == 0
    batches = open_batches(fetched.shards, bench_options(), reach)
    forget_files(fetched.shards, reach)
    assert len(batches.reader) == 15
    assert loading_rate(batches, 1, seconds=0.1).samples_per_second > 0
    assert reading_rate(batches, seconds=0.01)[0] > 0


def test_bench_copies_no_more_than_the_time_or_half_the_cache_allows(server, tmp_path):
    urls = [server.add(f"/{number:05d}.tar", bytes(10_000)) for number in range(20)]
    hasty = fetch(urls, access(cache_dir=str(tmp_path / "hasty")), seconds=0)
    assert 1 <= hasty.num_downloads <= 4
    small = fetch(urls, access(cache_dir=str(tmp_path / "small"), cache_size=100_000), seconds=60)
    assert 5 <= small.num_downloads <= 8  # four at once
