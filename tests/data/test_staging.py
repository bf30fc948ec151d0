import errno
import fcntl
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clip_train.data.retries import Cancelled
from clip_train.data.shard_cache import parse_bytes, readable_bytes
from clip_train.data.staging import Stager
from clip_train.errors import ConfigError, DataError
from tests.data.failing_server import Fault

MB = 1 << 20
CONTENT = os.urandom(3 * MB)
STAGE = "import sys; from clip_train.data.staging import Stager; Stager(sys.argv[1], 10**9).stage(sys.argv[2])"


@pytest.fixture
def stager(tmp_path) -> Stager:
    return Stager(tmp_path, 10**9, retries=2, timeout=10)


def staged(folder: Path) -> list[str]:
    """The stems of all files in the cache."""
    return sorted(path.name.split("-")[0] + "".join(path.suffixes[1:]) for path in (folder / "staged").iterdir())


def processes(count: int, stager: Stager, url: str) -> list[subprocess.Popen]:
    return [subprocess.Popen([sys.executable, "-c", STAGE, str(stager.cache.cache_dir), url]) for _ in range(count)]


def test_a_copy_is_whole_named_after_the_shard_and_made_once(server, stager, tmp_path):
    url = server.add("/set/00042.tar", CONTENT)
    path = stager.stage(url)
    assert (path.read_bytes(), path.name[:6], path.suffix) == (CONTENT, "00042-", ".tar")
    assert stager.stage(url) == path == stager.path(url)
    assert (server.requests, staged(tmp_path), stager.take_retries()) == (["/set/00042.tar"], ["00042"], 0)
    assert stager.path(f"{url}?other") != path


def test_a_copy_that_comes_again_looks_the_same_to_an_index(server, stager):
    url = server.add("/0.tar", CONTENT)
    first = stager.stage(url).stat()
    stager.path(url).unlink()
    assert stager.stage(url).stat().st_mtime_ns == first.st_mtime_ns
    stager.stage(url)
    assert stager.path(url).stat().st_mtime_ns == first.st_mtime_ns


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(status=500), "500"),
        (Fault(status=503), "503"),
        (Fault(after=2 * MB), "payload is not completed"),
        (Fault(after=2 * MB, stall=True), "no bytes"),
        (Fault(after=0, stall=True), "no bytes"),
    ],
)
def test_failures_that_pass_are_retried_counted_and_told(server, stager, caplog, fault, reason):
    stager.timeout = 2.5
    url = server.add("/0.tar", CONTENT)
    server.faults["/0.tar"] = [fault, fault]
    assert stager.stage(url).read_bytes() == CONTENT
    assert stager.take_retries() == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2 and all(url in line and reason in line and "\n" not in line for line in warnings)


def test_what_came_is_not_asked_for_again(server, stager):
    url = server.add("/0.tar", CONTENT)
    server.faults["/0.tar"] = [Fault(after=2 * MB)]
    stager.stage(url)
    assert server.sent["/0.tar"] < len(CONTENT) + MB // 2


def test_servers_without_ranges_start_again(server, stager):
    server.ranges = False
    url = server.add("/0.tar", CONTENT)
    server.faults["/0.tar"] = [Fault(after=2 * MB)]
    assert stager.stage(url).read_bytes() == CONTENT
    assert server.sent["/0.tar"] == 5 * MB


def test_servers_that_tell_no_size(server, stager):
    server.lengths = False
    assert stager.stage(server.add("/0.tar", CONTENT)).read_bytes() == CONTENT


def test_a_file_that_changed_in_between_starts_again(server, stager):
    url = server.add("/0.tar", CONTENT)
    server.faults["/0.tar"] = [Fault(after=2 * MB)] * 3
    with pytest.raises(DataError):
        stager.stage(url)
    changed = bytes(reversed(CONTENT))
    server.add("/0.tar", changed)
    assert stager.stage(url).read_bytes() == changed


def test_giving_up_names_url_reason_and_attempts(server, stager, tmp_path):
    url = server.add("/0.tar", CONTENT)
    server.faults["/0.tar"] = [Fault(status=500)] * 9
    with pytest.raises(DataError, match="given up after 3 attempts: 500") as error:
        stager.stage(url)
    assert url in str(error.value)
    assert staged(tmp_path) == []


@pytest.mark.parametrize(("status", "reason"), [(404, "does not exist"), (403, "access is denied"), (401, "denied")])
def test_permanent_errors_are_not_retried(server, stager, status, reason):
    url = server.add("/0.tar", CONTENT)
    server.faults["/0.tar"] = [Fault(status=status)]
    with pytest.raises(DataError, match=reason) as error:
        stager.stage(url)
    assert url in str(error.value)
    assert len(server.requests) == 1


def test_threads_and_processes_download_once(server, stager):
    server.seconds_per_request = 0.3
    url = server.add("/0.tar", CONTENT)
    others = processes(2, stager, url)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(stager.stage, [url] * 4))) == 1
    assert [process.wait(20) for process in others] == [0, 0]
    assert len(server.requests) == 1


def test_a_killed_download_is_gone_on_with(server, stager, tmp_path):
    url = server.add("/0.tar", CONTENT)
    server.faults["/0.tar"] = [Fault(after=len(CONTENT) - 1, stall=True)]
    (process,) = processes(1, stager, url)
    part = Path(f"{stager.path(url)}.part")
    wait_until(lambda: part.exists() and part.stat().st_size >= MB)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not stager.path(url).exists()
    left = part.stat().st_size
    assert stager.stage(url).read_bytes() == CONTENT
    assert server.sent["/0.tar"] == len(CONTENT) - 1 + len(CONTENT) - left + 1
    assert staged(tmp_path) == ["0"]


def test_a_part_from_before_a_crash_of_the_machine_is_not_trusted(server, stager, monkeypatch):
    url = server.add("/0.tar", CONTENT)
    server.faults["/0.tar"] = [Fault(after=2 * MB)] * 3
    with pytest.raises(DataError):
        stager.stage(url)
    part = Path(f"{stager.path(url)}.part")
    part.write_bytes(bytes(part.stat().st_size))
    monkeypatch.setattr("clip_train.data.shard_cache._boot_id", lambda: "another")
    assert stager.stage(url).read_bytes() == CONTENT


def test_least_recently_used_copies_go_first(server, tmp_path):
    stager = Stager(tmp_path, 3 * MB)
    urls = [server.add(f"/{name}.tar", bytes(MB)) for name in "abcd"]
    for url in urls[:3]:
        stager.stage(url)
    stager.stage(urls[0])
    stager.stage(urls[3])
    assert staged(tmp_path) == ["a", "c", "d"]


def test_stagers_share_one_limit_and_touch_nothing_else(server, tmp_path):
    (tmp_path / "staged").mkdir()
    for name in ("mine.tar", "../x-0123456789abcdef.tar"):
        (tmp_path / "staged" / name).write_bytes(bytes(9 * MB))
    first, second = Stager(tmp_path, 3 * MB), Stager(tmp_path, 3 * MB)
    urls = [server.add(f"/{name}.tar", bytes(MB)) for name in "abcdef"]
    for number, url in enumerate(urls):
        (first, second)[number % 2].stage(url)
        assert len(staged(tmp_path)) <= 4
    assert staged(tmp_path) == ["d", "e", "f", "mine.tar"]
    assert (tmp_path / "x-0123456789abcdef.tar").exists()


def test_room_is_made_before_the_download(server, tmp_path):
    stager = Stager(tmp_path, 3 * MB, retries=0)
    stager.stage(server.add("/a.tar", bytes(2 * MB)))
    url = server.add("/b.tar", CONTENT[: 2 * MB])
    server.faults["/b.tar"] = [Fault(after=10)]
    with pytest.raises(DataError):
        stager.stage(url)
    assert "a" not in staged(tmp_path)


def test_parts_of_dead_processes_are_evicted_too(server, tmp_path):
    stager = Stager(tmp_path, 3 * MB, retries=0)
    server.faults["/a.tar"] = [Fault(after=2 * MB)]
    with pytest.raises(DataError):
        stager.stage(server.add("/a.tar", CONTENT))
    stager.stage(server.add("/b.tar", CONTENT))
    assert staged(tmp_path) == ["b"]


def test_open_copies_are_kept_even_over_the_limit(server, tmp_path, caplog):
    stager = Stager(tmp_path, 2 * MB)
    urls = [server.add(f"/{name}.tar", bytes([number]) * MB) for number, name in enumerate("abc")]
    descriptors = [stager.open(url) for url in urls]
    assert staged(tmp_path) == ["a", "b", "c"]
    assert [line.getMessage() for line in caplog.records] == [
        "cache_size=2.1 MB is exceeded by 1.05 MB: all shards are in use"
    ]
    assert [os.pread(descriptor, 1, MB - 1) for descriptor in descriptors] == [b"\0", b"\1", b"\2"]
    os.close(descriptors[1])
    stager.cache.evict()
    assert staged(tmp_path) == ["a", "c"]


def test_open_and_eviction_at_once(server, tmp_path):
    stager = Stager(tmp_path, 2 * MB)
    urls = [server.add(f"/{number}.tar", bytes([number]) * MB) for number in range(4)]

    def read(number: int) -> bytes:
        descriptor = stager.open(urls[number % 4])
        try:
            assert os.fstat(descriptor).st_nlink == 1
            return os.pread(descriptor, 1, MB - 1)
        finally:
            os.close(descriptor)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(40))) == [bytes([number % 4]) for number in range(40)]


def test_a_shard_over_the_limit(server, tmp_path):
    url = server.add("/a.tar", CONTENT)
    for server.lengths in (True, False):
        with pytest.raises(DataError, match=r"a.tar takes .* MB or more, over the limit cache_size=2.1 MB"):
            Stager(tmp_path, 2 * MB).stage(url)


@pytest.fixture
def small_disk(monkeypatch, tmp_path) -> None:
    def write(descriptor: int, content: memoryview) -> int:
        used = sum(path.stat().st_size for path in (tmp_path / "staged").iterdir())
        if used >= 4 * MB:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, content[: 4 * MB - used])

    original = os.write
    monkeypatch.setattr("clip_train.data.shard_cache.os.write", write)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk(server, stager, tmp_path):
    urls = [server.add(f"/{name}.tar", CONTENT) for name in "abc"]
    for url in urls[:2]:
        assert stager.stage(url).read_bytes() == CONTENT
    assert staged(tmp_path) == ["b"]
    held = stager.open(urls[1])
    with pytest.raises(DataError, match=f"disk of cache_dir={tmp_path} is full: .* another cache_dir"):
        stager.stage(urls[2])
    os.close(held)


def test_a_cache_folder_that_cannot_be_used(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.cache_dir=.*file cannot be used"):
        Stager(tmp_path / "file", MB, group="data.").stage(server.add("/a.tar", CONTENT))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_stage_too(server, stager, method):
    urls = [server.add(f"/{name}.tar", CONTENT) for name in "ab"]
    stager.stage(urls[0])  # the parent has connections open
    process = multiprocessing.get_context(method).Process(target=stager.stage, args=(urls[1],))
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert stager.path(urls[1]).read_bytes() == CONTENT
    assert pickle.loads(pickle.dumps(stager)).path(urls[1]) == stager.path(urls[1])


def test_a_forked_child_does_not_hold_its_parents_locks(server, stager):
    stager.timeout = 1
    url = server.add("/a.tar", CONTENT)
    server.faults["/a.tar"] = [Fault(after=2 * MB, stall=True)]
    part = Path(f"{stager.path(url)}.part")
    stop = threading.Event()

    def stage() -> None:
        with pytest.raises(Cancelled):
            stager.stage(url, stop.is_set)

    thread = threading.Thread(target=stage)
    thread.start()
    wait_until(lambda: part.exists() and part.stat().st_size >= MB)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    stop.set()
    thread.join()
    with open(part) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    descriptors = Path(f"/proc/{child.pid}/fd")
    if descriptors.exists():
        assert str(part) not in [os.readlink(link) for link in descriptors.iterdir()]
    child.kill()
    child.join()


def test_cancelling_keeps_the_part(server, stager):
    url = server.add("/a.tar", CONTENT)
    asked = iter([False, False, True])
    with pytest.raises(Cancelled):
        stager.stage(url, cancelled=lambda: next(asked))
    assert Path(f"{stager.path(url)}.part").stat().st_size >= 2 * MB
    assert stager.stage(url).read_bytes() == CONTENT


def test_pipes(stager, tmp_path):
    (tmp_path / "00003.tar").write_bytes(CONTENT)
    path = stager.stage(f"pipe:cat {tmp_path}/00003.tar")
    assert (path.read_bytes(), path.name[:6]) == (CONTENT, "00003-")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo half; exit 3", "exit code 3"),
        ("no-such-program-at-all 2>/dev/null", "exit code 127"),
        ("echo half; (sleep 60; echo) & wait", "no bytes for 2.5 s"),
    ],
)
def test_pipes_that_fail(stager, tmp_path, command, reason):
    stager.timeout = 2.5
    start = time.monotonic()
    with pytest.raises(DataError, match=f"given up after 3 attempts: .*{reason}") as error:
        stager.stage(f"pipe:{command}")
    assert command in str(error.value)
    assert time.monotonic() - start < 40  # the command's children are ended as well
    assert staged(tmp_path) in ([], ["shard.part", "shard.part.json"])


@pytest.mark.parametrize(
    ("text", "size"), [("200GB", 200 * 10**9), ("1.5 tb", 15 * 10**11), ("2GiB", 2**31), (7, 7), ("1e3", None)]
)
def test_sizes(text, size):
    if size is None:
        with pytest.raises(ConfigError, match=r"data.cache_size=1e3 is not a size such as 200GB"):
            parse_bytes(text, "data.cache_size")
    else:
        assert parse_bytes(text, "data.cache_size") == size


def test_readable_sizes():
    assert [readable_bytes(size) for size in (999, 1000, 2_500_000, 10**12, 10**16)] == [
        "999 bytes",
        "1 KB",
        "2.5 MB",
        "1 TB",
        "1e+04 TB",
    ]


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
