import os

import pytest

from clip_train.data.shards import expand_shards
from clip_train.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for name in ("a0.tar", "a1.tar", "a2.tar", "b.tar"):
        (tmp_path / name).touch()
    return tmp_path


def expand(patterns) -> list[str]:
    return [os.path.basename(shard) for shard in expand_shards(patterns, "data.train.shards")]


def test_braces_globs_and_several(folder):
    assert expand(f"{folder}/a{{0..2}}.tar") == ["a0.tar", "a1.tar", "a2.tar"]
    assert expand(f"{folder}/a*.tar") == ["a0.tar", "a1.tar", "a2.tar"]
    assert expand(f"{folder}/b.tar::{folder}/a[01].tar") == ["b.tar", "a0.tar", "a1.tar"]
    assert expand([f"{folder}/b.tar", f"{folder}/a0.tar"]) == ["b.tar", "a0.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x*.tar", "no file matches"),
        ("a{0..3}.tar", "a3.tar does not exist"),
        ("", "is a folder"),
        ("{a", "nbalanced"),
        ("a0.tar::{folder}/a*.tar", r"names 1 shard\(s\) more than once, first .*a0.tar"),
    ],
)
def test_errors_name_setting_and_shard(folder, pattern, message):
    with pytest.raises(DataError, match=message) as error:
        expand_shards(f"{folder}/{pattern}".replace("{folder}", str(folder)), "data.train.shards")
    assert "data.train.shards" in str(error.value)


def test_urls_are_expanded_without_asking_the_network():
    assert expand_shards("s3://no-such/{0..1}.tar::https://no.such/{a,b}.tar?key=1", "x") == [
        "s3://no-such/0.tar",
        "s3://no-such/1.tar",
        "https://no.such/a.tar?key=1",
        "https://no.such/b.tar?key=1",
    ]
    assert expand_shards("pipe:cat {0..1}*.tar", "x") == ["pipe:cat 0*.tar", "pipe:cat 1*.tar"]


def test_file_urls_are_local(folder):
    assert expand_shards(f"file://{folder}/a*.tar", "x") == expand_shards(f"{folder}/a*.tar", "x")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host/*.tar", r"no listing; spell the shards out"),
        ("nothing://host/0.tar", "unknown scheme nothing://"),
        ("s3://bucket/${NAME}.tar", "missing environment variable"),
    ],
)
def test_urls_that_cannot_be_read(url, message):
    with pytest.raises(DataError, match=message) as error:
        expand_shards(url, "data.train.shards")
    assert "data.train.shards" in str(error.value)


def test_demo_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_TRAIN_CACHE", str(tmp_path))
    shards = expand_shards("demo:emoji/train/*.tar", "data.train.shards")
    assert len(shards) == 7
    times = [os.stat(shard).st_mtime_ns for shard in shards]
    assert [os.stat(s).st_mtime_ns for s in expand_shards("demo:emoji/train/*.tar", "x")] == times
    assert len(os.listdir(tmp_path / "demo")) == 1
    with pytest.raises(DataError, match="demo:emoji"):
        expand_shards("demo:cats/*.tar", "data.train.shards")
