"""Shards in a bucket on S3, in one of Google's, and in a dataset on the Hub: each on a server of its own here."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from clip_train.data.augmentation import Augmentation
from clip_train.data.batches import TrainBatches
from clip_train.data.loader import BatchStarts, make_loader
from clip_train.data.order import SampleOrder
from clip_train.data.pairs import PairReader
from clip_train.data.remote import open_remote
from clip_train.data.remote_shards import open_shards
from clip_train.data.shard_counts import remote_counts
from clip_train.data.shards import expand_shards
from clip_train.data.staging import Stager
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.errors import DataError
from tests.data.gcs_server import gcs_server, use_gcs
from tests.data.hub_server import Hub, hub_server, use_hub
from tests.data.s3_server import s3_server, use_s3

CONTENT = os.urandom(1 << 20)


@dataclass(frozen=True)
class Store:
    """Where files can be put and deleted, to be read below the URL `root`. `other` is the URL of none."""

    root: str
    other: str
    put: Callable[[str, bytes], Any]
    delete: Callable[[str], Any]


@contextmanager
def s3_store() -> Iterator[Store]:
    with s3_server() as client:
        client.create_bucket(Bucket="shards")
        yield Store(
            "s3://shards",
            "s3://none",
            lambda name, content: client.put_object(Bucket="shards", Key=name, Body=content),
            lambda name: client.delete_object(Bucket="shards", Key=name),
        )


@contextmanager
def gcs_store() -> Iterator[Store]:
    with gcs_server() as client:
        bucket = client.create_bucket("shards")
        put = lambda name, content: bucket.blob(name).upload_from_string(content)  # noqa: E731
        yield Store("gs://shards", "gs://none", put, bucket.delete_blob)


@contextmanager
def hub_store() -> Iterator[Store]:
    with hub_server() as hub:
        yield Store("hf://datasets/user/set", "hf://datasets/user/none", hub.files.__setitem__, hub.files.pop)


STORES = {"s3": s3_store, "gs": gcs_store, "hf": hub_store}


@pytest.fixture(scope="module", params=STORES)
def store(request) -> Iterator[Store]:
    """With three shards of the same content in the folder `set`, and the counts of two."""
    with STORES[request.param]() as store:
        for number in range(3):
            store.put(f"set/{number:05d}.tar", CONTENT)
        store.put("set/sizes.json", json.dumps({"00000.tar": 11, "00001.tar": 12}).encode())
        yield store


@pytest.fixture
def stager(tmp_path) -> Stager:
    return Stager(tmp_path, 10**9)


def test_a_shard_is_staged(store, stager):
    path = stager.stage(f"{store.root}/set/00000.tar")
    assert path.read_bytes() == CONTENT
    assert abs(path.stat().st_mtime - datetime.now(UTC).timestamp()) < 300


def test_a_shard_is_read_from_where_one_ended(store):
    url = f"{store.root}/set/00001.tar"
    with open_remote(url, 10) as stream:
        assert (stream.start, stream.size) == (0, len(CONTENT))
        version = stream.version
    for have in (1000, len(CONTENT)):
        with open_remote(url, 10, have=have, version=version) as stream:
            assert have - 1 <= stream.start <= have
            assert b"".join(stream.chunks) == CONTENT[stream.start :]


def test_a_shard_that_has_changed_is_read_from_its_beginning(store):
    url = f"{store.root}/changes.tar"
    store.put("changes.tar", CONTENT)
    with open_remote(url, 10) as stream:
        version = stream.version
    store.put("changes.tar", CONTENT[:-1])
    with open_remote(url, 10, have=1000, version=version) as stream:
        assert stream.start == 0
        assert b"".join(stream.chunks) == CONTENT[:-1]


@pytest.mark.parametrize("name", ["set/9.tar", "set", ""])
def test_shards_that_do_not_exist(store, stager, name):
    reason = "(it does not exist|.* is a folder|Attempt to open non key-like path)"
    for url in (f"{store.root}/{name}".rstrip("/"), f"{store.other}/{name}".rstrip("/")):
        with pytest.raises(DataError, match=f"shard {url}: {reason}"):
            stager.stage(url)
    assert stager.take_retries() == 0


def test_a_shard_that_vanishes_after_it_was_listed(store, stager):
    for name in ("vanishing/0.tar", "vanishing/1.tar"):
        store.put(name, CONTENT)
    first, second = expand_shards(f"{store.root}/vanishing/*.tar", "x")
    stager.stage(first)
    store.delete("vanishing/1.tar")
    with pytest.raises(DataError, match=f"shard {second}: it does not exist"):
        stager.stage(second)
    assert expand_shards(f"{store.root}/vanishing/*.tar", "x") == [first]


def test_globs(store):
    urls = [f"{store.root}/set/{number:05d}.tar" for number in range(3)]
    assert expand_shards(f"{store.root}/set/*.tar", "x") == urls
    assert expand_shards(f"{store.root}/set/0000[01].tar", "x") == urls[:2]
    assert set(urls) <= set(expand_shards(f"{store.root}/**/0*.tar", "x"))
    for pattern in (f"{store.root}/other/*.tar", f"{store.other}/*.tar"):
        with pytest.raises(DataError, match=r"data.train.shards: .*://"):
            expand_shards(pattern, "data.train.shards")


def test_counts_from_sizes_json(store, tmp_path):
    urls = [f"{store.root}/set/{number:05d}.tar" for number in range(3)]
    assert remote_counts([urls[1], urls[2], urls[0]], tmp_path) == [12, None, 11]


def test_batches_from_workers(store, stager, make_shards, tmp_path):
    for shard in make_shards([5, 4]):
        store.put(f"pairs/{Path(shard).name}", Path(shard).read_bytes())
    store.put("pairs/sizes.json", b'{"00000.tar": 5, "00001.tar": 4}')
    urls = expand_shards(f"{store.root}/pairs/*.tar", "x")
    Stager(tmp_path / "other", 10**9).stage(urls[0])  # the workers are forked from a process that has fetched one
    reader = PairReader(open_shards(urls, stager, None), "png", "txt")
    assert list(reader.counts) == [5, 4]
    assert not any(stager.path(url).exists() for url in urls)
    order = SampleOrder(reader.counts, seed=0, lanes=1)
    batches = TrainBatches(reader, order, Augmentation(), ClipTokenizer(16), 16, batch_size=3, stager=stager)
    loaded = [batch for _, batch in zip(range(3), make_loader(batches, BatchStarts(0, 3), num_workers=1))]
    assert not any(batch["error"] for batch in loaded)
    assert all(stager.path(url).exists() for url in urls)


@pytest.fixture
def s3() -> Iterator[str]:
    with s3_store() as store:
        store.put("0.tar", CONTENT)
        yield f"{store.root}/0.tar"


def test_s3_tells_when_a_shard_was_written(s3, stager):
    first = stager.stage(s3).stat().st_mtime_ns
    stager.path(s3).unlink()
    assert stager.stage(s3).stat().st_mtime_ns == first


def test_s3_without_credentials(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match=r"no credentials found; .*FSSPEC_S3_ANON=true"):
        Stager(tmp_path, 10**9, timeout=11).stage(s3)


SERVERS = [("s3://shards/0.tar", use_s3), ("gs://shards/0.tar", use_gcs), ("hf://datasets/user/set/0.tar", use_hub)]


@pytest.mark.parametrize(("url", "use"), SERVERS)
def test_a_server_that_is_not_there_is_tried_as_often_as_said(tmp_path, monkeypatch, url, use):
    use("http://127.0.0.1:9", monkeypatch)
    stager = Stager(tmp_path, 10**9, retries=2, timeout=1)
    with pytest.raises(DataError, match=r"given up after 3 attempts: .*127.0.0.1:9"):
        stager.stage(url)
    assert stager.take_retries() == 2


@pytest.mark.parametrize(("url", "use"), SERVERS)
def test_a_server_that_does_not_answer(tmp_path, monkeypatch, url, use):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        with pytest.raises(DataError, match=r"given up after 2 attempts: (Read timeout|no bytes within)"):
            Stager(tmp_path, 10**9, retries=1, timeout=0.4).stage(url)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        hub.files["0.tar"] = CONTENT
        yield hub


def test_a_private_dataset(hub, stager, monkeypatch):
    hub.token = "hf_secret"
    with pytest.raises(DataError, match=r"access is denied \(401 Invalid username or password.\)"):
        stager.stage("hf://datasets/user/set/0.tar")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert stager.stage("hf://datasets/user/set/0.tar").read_bytes() == CONTENT
    assert hub.tokens == [None]


def test_a_dataset_is_read_with_one_request_for_each_shard(hub, stager):
    stager.stage("hf://datasets/user/set/0.tar")
    assert hub.requests == ["/datasets/user/set/resolve/main/0.tar", "/cdn/0.tar"]


def test_a_change_in_a_dataset_is_noticed_by_its_content(hub):
    with open_remote("hf://datasets/user/set/0.tar", 10) as stream:
        version = stream.version
    hub.files["0.tar"] = bytes(len(CONTENT))
    with open_remote("hf://datasets/user/set/0.tar", 10, have=1000, version=version) as stream:
        assert (stream.start, stream.size) == (0, len(CONTENT))


def test_hf_endpoint(hub, tmp_path):
    program = "; ".join(
        [
            "from clip_train.data.remote import glob_remote",
            "from clip_train.data.staging import Stager",
            "[url] = glob_remote('hf://datasets/user/set/*.tar', 60)",
            f"Stager({str(tmp_path)!r}, 10**9).stage(url)",
        ]
    )
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"HF_ENDPOINT": hub.url}, check=True, timeout=100)
    assert Stager(tmp_path, 10**9).path("hf://datasets/user/set/0.tar").read_bytes() == CONTENT
