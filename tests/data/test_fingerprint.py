import json
import shutil
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_train.data import fingerprint
from clip_train.data.class_names import ClassNames
from clip_train.data.fingerprint import describe, differences, digest
from clip_train.data.index import load_indexes
from clip_train.data.pairs import PairReader
from clip_train.data.sources import order_sources


def reader(counts: list[int], names: list[str] | None = None) -> PairReader:
    """Of shards that are never opened."""
    names = names or [f"s3://bucket/cc12m/{number:05d}.tar" for number in range(len(counts))]
    shards = [SimpleNamespace(shard=name, count=count) for name, count in zip(names, counts)]
    return PairReader(cast(Any, shards), "jpg", "txt")


def described(sources: dict[str, PairReader], weights=None, seed=0, lanes=64, window=4096):
    """As it comes back from a file."""
    order = order_sources(sources, weights, seed=seed, lanes=lanes, window=window)
    return json.loads(json.dumps(describe(sources, order)))


def cc12m(counts: list[int], names: list[str] | None = None, **settings):
    return described({"cc12m": reader(counts, names)}, **settings)


def test_what_is_described():
    found = cc12m([5, 6, 7])
    assert {key: found[key] for key in ("order_version", "lanes", "shuffle_window", "samples", "weights")} == {
        "order_version": 1,
        "lanes": 64,
        "shuffle_window": 4096,
        "samples": 18,
        "weights": [],
    }
    (source,) = found["sources"]
    assert (source["name"], source["shards"], source["samples"]) == ("cc12m", 3, 18)
    assert (source["first"], source["last"]) == ("00000.tar", "00002.tar")


def test_forty_thousand_shards_are_described_in_a_few_lines():
    assert len(json.dumps(cc12m([10_000] * 40_000))) < 1000


def test_the_same_data_elsewhere_with_another_seed_is_the_same(make_shards, tmp_path):
    shards = make_shards([3, 2])
    moved = [shutil.copy(shard, tmp_path) for shard in shards]
    here, there = ({"a": PairReader(load_indexes(paths), "png", "txt")} for paths in (shards, moved))
    assert differences(described(here), described({"b": here["a"]}, seed=1)) == []
    assert differences(described(here), described(there)) == []


def test_a_token_in_a_web_address_does_not_matter():
    one, other = (cc12m([5], [f"https://host/00000.tar?token={token}"]) for token in "ab")
    assert differences(one, other) == []
    assert one["sources"][0]["first"] == "00000.tar"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            cc12m([5, 6]),
            "cc12m: 2 shards, was 3; 00000.tar to 00001.tar, was 00000.tar to 00002.tar; 11 samples, was 18",
        ),
        (cc12m([5, 6, 8]), "cc12m: 19 samples, was 18, in shards of the same names"),
        (
            cc12m([6, 5, 7]),
            "cc12m: still 18 samples, but other numbers of them in each shard, in shards of the same names",
        ),
        (
            cc12m([5, 6, 7], ["00000.tar", "x.tar", "00002.tar"]),
            "cc12m: 3 shards as before, but of other names or in another order; "
            "the first and last are still 00000.tar and 00002.tar; 18 samples, was 18",
        ),
        (cc12m([5, 6, 7], lanes=8), "data.lanes: 8, was 64"),
        (cc12m([5, 6, 7], window=100), "data.shuffle_window: 100, was 4096"),
        (
            described({"cc3m": reader([5]), "coco": reader([6])}, [3, 1]),
            "2 sources (cc3m, coco), was 1 source (cc12m)",
        ),
    ],
)
def test_differences_in_words(changed, said):
    assert differences(cc12m([5, 6, 7]), changed) == [said]


def test_weights_are_shares():
    sources = {"a": reader([50], ["a.tar"]), "b": reader([60], ["b.tar"])}
    assert differences(described(sources, [3, 1]), described(sources, [6, 2])) == []
    assert differences(described(sources, [3, 1]), described(sources, [1, 1])) == [
        "data.train.weights: 0.5 : 0.5, was 0.75 : 0.25"
    ]
    without, one = described(sources), described({"a": sources["a"]})
    assert differences(without, described(sources, [1, 1])) == ["2 sources (a, b), was 1 source (a+b)"]
    assert differences(one, described({"a": sources["a"]}, [1])) == []  # one source with a weight is itself


def test_sources_without_weights_are_one():
    names = [f"{number:05d}.tar" for number in range(2)]
    apart = described({"a": reader([5], names[:1]), "b": reader([6], names[1:])})
    assert differences(described({"all": reader([5, 6], names)}), apart) == []


def test_each_source_that_differs_is_named():
    old = described({"a": reader([5]), "b": reader([6])}, [3, 1])
    new = described({"a": reader([7]), "b": reader([6])}, [3, 1])
    assert differences(old, new) == ["a: 7 samples, was 5, in shards of the same names"]


def test_another_order_is_a_difference(monkeypatch):
    old = cc12m([5])
    monkeypatch.setattr(fingerprint, "ORDER_VERSION", 2)
    (line,) = differences(old, cc12m([5]))
    assert line.startswith("the order of samples: version 2, was 1")


def test_other_names_of_classes_are_a_difference(make_shards):
    shards = load_indexes(make_shards([3, 2], lambda sample: sample | {"cls": "0"}))
    old, new = (
        described({"a": PairReader(list(shards), "png", "cls", "data.train", ClassNames(names, ("{}",)))})
        for names in (("cat", "dog"), ("dog", "cat"))
    )
    assert differences(old, old) == []
    assert differences(old, new) == ["a: its classes have other names or templates than before"]
    assert digest(old) != digest(new)


def test_a_description_that_lacks_something_is_not_taken_for_the_same():
    whole = cc12m([5, 6])
    for key in ("order_version", "lanes", "shuffle_window", "weights", "sources"):
        assert differences({k: v for k, v in whole.items() if k != key}, whole)
    assert "was not noted" in differences(whole | {"sources": [{"name": "cc12m"}]}, whole)[0]


descriptions = st.builds(
    lambda counts, lanes, window: cc12m(counts, lanes=lanes, window=window),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 2),
    st.integers(1, 2),
)


@given(descriptions, descriptions)
def test_the_digest_differs_where_anything_does(one, other):
    assert (digest(one) == digest(other)) == (differences(one, other) == [])
    assert differences(one, one) == []
