import builtins
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from clip_train.data import remote
from clip_train.data.index import load_index
from clip_train.data.remote import check_scheme, open_remote, scheme_of
from clip_train.data.retries import explain, is_permanent
from clip_train.data.shard_counts import remote_counts
from clip_train.data.shards import expand_shards
from clip_train.data.staging import Stager
from clip_train.errors import DataError
from tests.conftest import make_sample, write_shard
from tests.data.failing_server import Fault
from tests.data.s3_server import s3_server

CONTENT = os.urandom(3 << 20)


@pytest.fixture(scope="module")
def s3() -> Iterator:
    """A bucket `shards` on a local S3 server."""
    with s3_server() as client:
        client.create_bucket(Bucket="shards")
        for number in range(3):
            client.put_object(Bucket="shards", Key=f"set/{number:05d}.tar", Body=CONTENT)
        client.put_object(Bucket="shards", Key="set/sizes.json", Body=json.dumps({"00000.tar": 11, "00001.tar": 12}))
        yield client


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("s3://b/0.tar", "s3"),
        ("HTTPS://h/0.tar", "https"),
        ("pipe:cat 0.tar", "pipe"),
        ("hf://datasets/a/b/0.tar", "hf"),
        ("/data/0.tar", None),
        ("data:0/0.tar", None),
        ("file:///data/0.tar", None),
        ("demo:emoji/0.tar", None),
    ],
)
def test_schemes(url, scheme):
    assert scheme_of(url) == scheme


def test_a_missing_package_names_the_extra(monkeypatch):
    def refuse(name: str, *args, **kwargs):
        if name.partition(".")[0] == "gcsfs":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"gs://b/0.tar: gs:// needs gcsfs: pip install 'clip_train\[remote\]'"):
        check_scheme("gs://b/0.tar")


def test_s3_shards_are_staged(s3, tmp_path):
    stager = Stager(tmp_path, 10**9)
    path = stager.stage("s3://shards/set/00000.tar")
    assert path.read_bytes() == CONTENT
    assert abs(path.stat().st_mtime - datetime.now(UTC).timestamp()) < 300
    first = path.stat().st_mtime_ns
    path.unlink()
    assert stager.stage("s3://shards/set/00000.tar").stat().st_mtime_ns == first


def test_s3_is_read_from_where_one_ended(s3):
    with open_remote("s3://shards/set/00001.tar", 10) as stream:
        assert (stream.start, stream.size) == (0, len(CONTENT))
        version = stream.version
    with open_remote("s3://shards/set/00001.tar", 10, have=1000, version=version) as stream:
        assert stream.start == 1000
        assert b"".join(stream.chunks) == CONTENT[1000:]
    with open_remote("s3://shards/set/00001.tar", 10, have=1000, version="of another file") as stream:
        assert stream.start == 0


@pytest.mark.parametrize("url", ["s3://shards/set/9.tar", "s3://no-such-bucket/0.tar", "s3://shards/set"])
def test_s3_shards_that_do_not_exist(s3, tmp_path, url):
    stager = Stager(tmp_path, 10**9)
    with pytest.raises(DataError, match=f"shard {url}: "):
        stager.stage(url)
    assert stager.take_retries() == 0


def test_s3_without_credentials(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match=r"no credentials found; .*FSSPEC_S3_ANON=true"):
        Stager(tmp_path, 10**9, timeout=11).stage("s3://shards/set/00000.tar")


def test_an_s3_server_that_is_not_there_is_tried_as_often_as_said(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    stager = Stager(tmp_path, 10**9, retries=2, timeout=1)
    with pytest.raises(DataError, match=r"given up after 3 attempts: .*127.0.0.1:9"):
        stager.stage("s3://shards/set/00000.tar")
    assert stager.take_retries() == 2


def test_an_s3_server_that_does_not_answer(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        with pytest.raises(DataError, match=r"given up after 2 attempts: Read timeout"):
            Stager(tmp_path, 10**9, retries=1, timeout=0.4).stage("s3://shards/set/00000.tar")


def test_s3_globs(s3):
    assert expand_shards("s3://shards/set/*.tar", "x") == [f"s3://shards/set/{i:05d}.tar" for i in range(3)]
    assert expand_shards("s3://shards/set/0000[01].tar", "x") == [f"s3://shards/set/{i:05d}.tar" for i in range(2)]
    for pattern in ("s3://shards/other/*.tar", "s3://no-such-bucket/*.tar"):
        with pytest.raises(DataError, match=r"data.train.shards: .*s3://"):
            expand_shards(pattern, "data.train.shards")


def test_counts_from_sizes_json(s3, tmp_path):
    urls = [f"s3://shards/set/{i:05d}.tar" for i in range(3)]
    assert remote_counts([urls[1], urls[2], urls[0]], tmp_path) == [12, None, 11]


def test_counts_from_img2dataset(server, tmp_path):
    urls = [server.url + f"/set/{i:05d}.tar?key=1" for i in range(4)]
    for number in (0, 1, 3):
        server.add(f"/set/{number:05d}_stats.json", json.dumps({"count": 99, "successes": 10 + number}).encode())
    server.faults["/set/00000_stats.json"] = [Fault(status=503)]
    assert remote_counts(urls, tmp_path) == [10, 11, None, 13]


def test_counts_that_nothing_tells_take_few_requests(server, tmp_path):
    urls = [server.url + f"/set/{i:05d}.tar" for i in range(50)]
    assert remote_counts([*urls, "pipe:cat 0.tar"], tmp_path) == [None] * 51
    assert server.requests == ["/set/sizes.json", "/set/00000_stats.json"]


@pytest.fixture
def staged_once(server, tmp_path) -> str:
    """The URL of a shard of two samples that was indexed, and whose copy was evicted since."""
    with open(write_shard(tmp_path / "0.tar", [make_sample(0), make_sample(1)]), "rb") as file:
        url = server.add("/0.tar", file.read())
    copy = Stager(tmp_path, 10**9).stage(url)
    load_index(str(copy), str(tmp_path))
    copy.unlink()
    return url


def test_counts_from_the_index_of_a_shard_that_was_staged_once(server, staged_once, tmp_path):
    assert remote_counts([staged_once, server.url + "/1.tar"], tmp_path) == [2, None]
    server.add("/sizes.json", b'{"0.tar": 3}')
    assert remote_counts([staged_once], tmp_path) == [3]


def test_counts_without_network(server, staged_once, tmp_path, caplog):
    server.faults["/sizes.json"] = [Fault(status=503)] * 9
    assert remote_counts([staged_once], tmp_path) == [2]
    assert "samples are counted in the local copies" in caplog.text
    with pytest.raises(DataError, match=r"sizes.json: given up after 3 attempts"):
        remote_counts([staged_once, server.url + "/1.tar"], tmp_path, retries=2)


def test_counts_that_cannot_be_used(server, tmp_path, caplog):
    url = server.add("/0.tar", b"")
    server.add("/sizes.json", b"<html>welcome")
    assert remote_counts([url], tmp_path) == [None]
    assert f"{server.url}/sizes.json is not JSON" in caplog.text
    server.add("/sizes.json", b'{"0.tar": "many"}')
    with pytest.raises(DataError, match=r"sizes.json: 0.tar is 'many', not a number of samples"):
        remote_counts([url], tmp_path)


def test_options_of_the_user_are_kept(server, monkeypatch):
    monkeypatch.setattr(remote, "conf", {"http": {"client_kwargs": {"headers": {"X": "1"}}}})
    options = remote._options("http", 5)["client_kwargs"]
    assert options["headers"] == {"X": "1"}
    assert options["timeout"].sock_read == 5


class _HubError(Exception):
    def __init__(self, status_code: int) -> None:
        super().__init__(f"status {status_code}")
        self.response = type("Response", (), {"status_code": status_code})()


@pytest.mark.parametrize(
    ("error", "permanent", "reason"),
    [
        (FileNotFoundError("x"), True, "it does not exist"),
        (PermissionError("Forbidden"), True, r"access is denied \(Forbidden\)"),
        (OSError("Forbidden: b/o/0.tar\nno"), True, "Forbidden: b/o/0.tar no"),
        (_HubError(404), True, "status 404"),
        (_HubError(429), False, "status 429"),
        (_HubError(401), True, "access is denied"),
        (ConnectionResetError(), False, "ConnectionResetError"),
        (TimeoutError(), False, "no bytes within the time-out"),
    ],
)
def test_which_failures_pass(error, permanent, reason):
    assert is_permanent(error) == permanent
    with pytest.raises(Exception, match=reason):
        raise RuntimeError(explain(error))
