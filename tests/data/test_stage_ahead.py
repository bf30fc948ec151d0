import time
from collections.abc import Iterator
from itertools import cycle, islice

import pytest

from clip_train.data import stage_ahead
from clip_train.data.stage_ahead import StageAhead
from clip_train.data.staging import Stager
from clip_train.errors import DataError
from tests.data.failing_server import FailingServer, Fault

KB = 1 << 10


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(stage_ahead, "_LEAST_INTERVAL_S", 0.01)


@pytest.fixture
def urls(server) -> list[str]:
    return [server.add(f"/{number:02d}.tar", bytes(10 * KB)) for number in range(30)]


@pytest.fixture
def stager(tmp_path) -> Stager:
    return Stager(tmp_path, 100 * KB, retries=1, timeout=5)


def from_sample(urls: list[str]):
    """Ten samples per shard, epoch after epoch."""
    return lambda samples_seen: islice(cycle(urls), samples_seen // 10 % len(urls), None)


def requested(server: FailingServer) -> list[int]:
    return [int(path[1:3]) for path in server.requests]


def wait_until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_stages_in_order_up_to_half_the_cache(server, urls, stager):
    ahead = StageAhead(stager, from_sample(urls), position=30, threads=1)
    wait_until(lambda: len(server.requests) == 5)
    time.sleep(0.2)
    assert requested(server) == [3, 4, 5, 6, 7]
    ahead.advance(60)
    wait_until(lambda: len(server.requests) == 8)
    time.sleep(0.2)
    assert requested(server) == [3, 4, 5, 6, 7, 8, 9, 10]
    ahead.check()
    ahead.close()


def test_downloads_several_at_once_and_none_twice(server, urls, stager):
    server.seconds_per_request = 0.1
    ahead = StageAhead(stager, lambda samples_seen: iter(urls[samples_seen // 10 :]), threads=4)
    for step in range(0, 300, 10):
        stager.stage(urls[step // 10])
        ahead.advance(step + 10)
    ahead.close()
    ahead.check()
    assert sorted(requested(server)) == list(range(30))


def test_upcoming_copies_outlive_those_that_were_used(server, urls, stager):
    for url in urls[:9]:
        stager.stage(url)
    server.requests.clear()
    upcoming = [urls[0], urls[1], urls[20], urls[21], urls[22]]
    ahead = StageAhead(stager, lambda _: iter(upcoming))
    wait_until(lambda: all(stager.path(url).exists() for url in upcoming))
    ahead.close()
    assert sorted(requested(server)) == [20, 21, 22]
    assert stager.path(urls[8]).exists() and not stager.path(urls[2]).exists()


def test_a_set_smaller_than_the_cache_is_staged_once(server, urls, stager):
    ahead = StageAhead(stager, from_sample(urls[:3]))
    for samples_seen in range(0, 300, 10):
        ahead.advance(samples_seen)
        time.sleep(0.005)
    wait_until(lambda: all(stager.path(url).exists() for url in urls[:3]))
    ahead.close()
    ahead.check()
    assert sorted(requested(server)) == [0, 1, 2]


def test_an_error_stops_it_and_reaches_the_trainer(server, urls, stager):
    server.faults["/02.tar"] = [Fault(status=404)]
    ahead = StageAhead(stager, from_sample(urls), threads=1)
    wait_until(lambda: not any(thread.is_alive() for thread in ahead._threads))
    with pytest.raises(DataError, match=r"02.tar: it does not exist"):
        ahead.check()
    assert requested(server) == [0, 1, 2]
    ahead.close()


def test_an_error_of_the_order_reaches_the_trainer(stager):
    def broken(samples_seen: int) -> Iterator[str]:
        raise ZeroDivisionError(samples_seen)

    ahead = StageAhead(stager, broken, position=7)
    wait_until(lambda: not any(thread.is_alive() for thread in ahead._threads))
    with pytest.raises(ZeroDivisionError, match="7"):
        ahead.check()


def test_close_does_not_wait_for_the_network(server, urls, tmp_path):
    for url in urls:
        server.faults[url[-7:]] = [Fault(after=KB, stall=True)]
    ahead = StageAhead(Stager(tmp_path, 100 * KB, timeout=20), from_sample(urls))
    wait_until(lambda: len(server.requests) >= 4)
    start = time.monotonic()
    ahead.close()
    assert time.monotonic() - start < 10
    ahead.check()


def test_close_ends_all_threads_that_are_not_at_the_network(server, urls, stager):
    ahead = StageAhead(stager, from_sample(urls))
    wait_until(lambda: len(server.requests) >= 5)
    ahead.close()
    assert not any(thread.is_alive() for thread in ahead._threads)
