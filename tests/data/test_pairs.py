import os
import resource
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest

from clip_train.data.captions import CaptionKey, UnusableCaption
from clip_train.data.index import load_indexes
from clip_train.data.pairs import PairReader
from clip_train.errors import ConfigError, DataError
from tests.conftest import make_sample


def reader(shards, image_key="jpg;jpeg;png;webp", caption_key="txt") -> PairReader:
    return PairReader(load_indexes(shards), image_key, caption_key)


def test_reads_any_pair(make_shards):
    pairs = reader(make_shards([3, 2]))
    assert (len(pairs), pairs.counts) == (5, [3, 2])
    pair = pairs.read(1, 1)
    assert (pair.image, pair.caption(0.5)) == (make_sample(4)["png"], make_sample(4)["txt"])
    assert pairs.key(1, 1) == "000004"


def test_json_paths(make_shards):
    shards = make_shards([2])
    pair = reader(shards, caption_key="json:captions").read(0, 1)
    assert [pair.caption(0.4), pair.caption(0.6)] == ["a green thing number 1", "thing 1"]
    assert reader(shards, caption_key="json:nested.title").read(0, 1).first_caption() == "A GREEN THING NUMBER 1"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_key": "jpg"}, r"no images under data.image_key=jpg \(found: json, png, txt\)"),
        ({"caption_key": "text"}, r"no captions under data.caption_key=text \(found: json, png, txt\)"),
        ({"caption_key": "json:caption"}, r"no entry 'caption' in its json \(found: captions, nested\)"),
    ],
)
def test_wrong_keys_name_those_that_are_there(make_shards, keys, message):
    with pytest.raises(DataError, match=message):
        reader(make_shards([2]), **keys)


def test_incomplete_samples_are_left_out_and_counted(make_shards):
    def without_text_when_odd(sample: dict) -> dict:
        return {k: v for k, v in sample.items() if k != "txt" or int(sample["__key__"]) % 2 == 0}

    pairs = reader(make_shards([5, 4], without_text_when_odd))
    assert (pairs.counts, pairs.num_incomplete) == ([3, 2], 4)
    assert [pairs.read(0, i).first_caption()[-1] for i in range(3)] == ["0", "2", "4"]


def open_shards(pairs: PairReader, shards: Sequence[int]) -> list[int]:
    """Read of these shards in turn; returns which of them had to be opened."""
    with patch("clip_train.data.pairs.os.open", wraps=os.open) as opening:
        for shard in shards:
            assert pairs.read(shard, 0).first_caption().endswith(str(shard))
    return [int(Path(call.args[0]).stem) for call in opening.call_args_list]


def test_as_many_shards_stay_open_as_are_read_in_turn(make_shards):
    pairs = reader(make_shards([1] * 5))
    pairs.keep_open(2)
    assert open_shards(pairs, [0, 1, 1, 0, 2, 3, 4, 0]) == [1, 2, 3, 4, 0]  # the first was opened to check its captions
    pairs.keep_open(3)
    assert open_shards(pairs, [0, 1, 4] * 3) == [1]


def test_descriptors_follow_and_have_a_limit(make_shards):
    pairs = reader(make_shards([1]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
        pairs.keep_open(1000)
        assert (pairs._most_open, resource.getrlimit(resource.RLIMIT_NOFILE)) == (1000, (1512, hard))
        pairs.keep_open(10**9)
        assert pairs._most_open == min(30_000, hard - 512)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_odd_first_sample_does_not_forbid_a_caption_path(make_shards):
    def without_captions_first(sample: dict) -> dict:
        return sample | ({"json": {"captions": []}} if sample["__key__"] == "000000" else {})

    assert len(reader(make_shards([3], without_captions_first), caption_key="json:captions")) == 3


def test_json_that_breaks_parsers_is_unusable():
    for content in (b'{"a": ' + b"1" * 5000 + b"}", b"[" * 100_000):
        with pytest.raises(UnusableCaption):
            CaptionKey.parse("json:a").read(content)


@pytest.mark.parametrize(
    "content", [b"", b"  \n", b"\xff\xfe", b"{}", b'{"a": 3}', b'{"a": []}', b'{"a": [" "]}', b"[1]", b"{"]
)
def test_unusable_captions(content):
    key = CaptionKey.parse("json:a") if content[:1] in (b"{", b"[") else CaptionKey.parse("txt")
    with pytest.raises(UnusableCaption):
        key.read(content)


@pytest.mark.parametrize("key", ["", "json:", ":a", "txt:a"])
def test_bad_caption_keys(key):
    with pytest.raises(ConfigError, match="caption_key"):
        CaptionKey.parse(key)
