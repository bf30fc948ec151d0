import shutil

import pytest

from clip_train.data.index import load_indexes
from clip_train.data.mixture import Mixture
from clip_train.data.order import SampleOrder
from clip_train.data.shards import expand_shards
from clip_train.data.sources import open_sources, order_sources
from clip_train.errors import ConfigError, DataError


def sources(shards: list[str], caption_key: str | list[str] = "txt", image_key: str = "png"):
    return open_sources(
        "::".join(shards), image_key, caption_key, lambda pattern: load_indexes(expand_shards(pattern, "x")), "data"
    )


def test_sources_are_named_after_their_folders(make_shards):
    shards = make_shards([3, 4, 5])
    opened = sources(shards)
    assert list(opened) == ["shards", "shards_1", "shards_2"]
    assert [reader.counts for reader in opened.values()] == [[3], [4], [5]]


def test_names_of_sources_do_not_collide(make_shards, tmp_path):
    for number, folder in enumerate(("x_2", "x", "old/x")):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(make_shards([1 + number])[0], tmp_path / folder / "0.tar")
    opened = sources([f"{tmp_path}/{folder}/0.tar" for folder in ("x_2", "x", "old/x")])
    assert [sum(reader.counts) for reader in opened.values()] == [1, 2, 3]


def test_each_source_may_have_its_own_keys(make_shards):
    opened = sources(make_shards([3, 4]), caption_key=["txt", "json:nested.title"])
    captions = [reader.read(0, 0).first_caption() for reader in opened.values()]
    assert captions == ["a red thing number 0", "A YELLOW THING NUMBER 3"]
    with pytest.raises(ConfigError, match=r"data.caption_key has 3 entries, but there are 2 sources"):
        sources(make_shards([3, 4]), caption_key=["txt"] * 3)


def test_without_weights_sources_are_one_set(make_shards):
    options = {"seed": 0, "lanes": 4, "window": 8}
    opened = sources(make_shards([3, 4]))
    joined = order_sources(opened, None, **options)
    assert isinstance(joined, SampleOrder) and joined.num_samples == 7
    mixed = order_sources(opened, [3, 1], **options)
    assert isinstance(mixed, Mixture) and mixed.num_samples == 7
    with pytest.raises(ConfigError, match=r"data.train.weights=\[1\] are 1, the sources of data.train.shards 2"):
        order_sources(opened, [1], **options)


def test_a_shard_in_two_sources_that_are_joined_is_an_error(make_shards):
    (shard,) = make_shards([3])
    with pytest.raises(DataError, match="more than once"):
        order_sources(sources([shard, shard]), None, seed=0, lanes=4, window=8)
