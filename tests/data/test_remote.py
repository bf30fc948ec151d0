import json
import sys

import pytest
from fsspec.registry import _registry
from gcsfs.core import GCSFileSystem
from huggingface_hub import HfFileSystem

from clip_train.data import remote
from clip_train.data.index import load_index
from clip_train.data.remote import check_scheme, scheme_of
from clip_train.data.retries import explain, is_permanent
from clip_train.data.shard_counts import remote_counts
from clip_train.data.staging import Stager
from clip_train.data.store_addresses import google_address, hub_address
from clip_train.errors import DataError
from tests.conftest import make_sample, write_shard
from tests.data.failing_server import Fault


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
    monkeypatch.delitem(_registry, "gs", raising=False)  # it knows what was imported before
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs://b/0.tar: gs:// needs gcsfs: pip install '\.\[remote\]' in the checkout"):
        check_scheme("gs://b/0.tar")


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


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("hf://datasets/a/b/x/0 1.tar", "/datasets/a/b/resolve/main/x/0%201.tar"),
        ("hf://datasets/a/b@v1.0/0.tar", "/datasets/a/b/resolve/v1.0/0.tar"),
        ("hf://datasets/a/b@refs/pr/3/0.tar", "/datasets/a/b/resolve/refs%2Fpr%2F3/0.tar"),
        ("hf://a/b/0.tar", "/a/b/resolve/main/0.tar"),
        ("hf://buckets/a/b/x/0.tar", "/buckets/a/b/resolve/x/0.tar"),
    ],
)
def test_addresses_on_the_hub(url, address):
    found, headers = hub_address(url, HfFileSystem(endpoint="http://hub", token="hf_secret"))
    assert (found, headers["authorization"]) == (f"http://hub{address}", "Bearer hf_secret")


def test_addresses_in_buckets_of_google():
    fs = GCSFileSystem(token="anon", endpoint_url="http://google")
    address = "http://google/download/storage/v1/b/b/o/x%2F0%201.tar?alt=media"
    assert google_address("gs://b/x/0 1.tar", fs) == (address, {})
    payer = GCSFileSystem(token="anon", project="me", requester_pays=True)
    assert google_address("gs://b/0.tar", payer)[1] == {"X-Goog-User-Project": "me"}


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
