import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_train.data.captions import CaptionSource, UnusableCaption, drop_words
from clip_train.errors import ConfigError

UNIFORMS = ((np.arange(1000) + 0.5) / 1000).tolist()
FILES = {
    "txt": b"alt text",
    "json": json.dumps(
        {"captions": ["one", " ", "two", "three"], "synthetic": "made up", "meta": {"title": "T"}}
    ).encode(),
}
uniforms = st.floats(0, 1, exclude_max=True)


def drawn(config, files=FILES) -> Counter[str]:
    source = CaptionSource.parse(config)
    return Counter(source.draw(files, uniform) for uniform in UNIFORMS)


def test_one_key_has_one_caption_or_draws_from_its_list():
    assert drawn("txt") == {"alt text": 1000}
    assert drawn("json:meta.title") == {"T": 1000}
    assert drawn("json:captions") == pytest.approx({"one": 333, "two": 333, "three": 333}, abs=1)


def test_keys_are_drawn_by_weight():
    assert drawn({"txt": 7, "json:synthetic": 3}) == {"alt text": 700, "made up": 300}
    assert drawn({"json:synthetic": 0.3, "txt": 0.7}) == {"alt text": 700, "made up": 300}


def test_one_number_decides_key_and_entry_independently():
    counts = drawn({"txt": 1, "json:captions": 3})
    assert counts == pytest.approx({"alt text": 250, "one": 250, "two": 250, "three": 250}, abs=1)


def test_extensions_are_those_to_read():
    assert CaptionSource.parse("json:captions").extensions == ("json",)
    config = {"txt": 2, "json:captions": 1, "json:synthetic": 3}
    assert CaptionSource.parse(config).extensions == ("json", "txt")


@pytest.mark.parametrize("text", [None, b"", b" \n", b"\xff"])
def test_other_keys_stand_in_for_one_without_a_caption(text):
    files = {"json": FILES["json"]} if text is None else {**FILES, "txt": text}
    assert drawn({"txt": 0.6, "json:synthetic": 0.3, "json:meta.title": 0.1}, files) == {"made up": 900, "T": 100}


def test_evaluation_takes_the_heaviest_key_that_has_a_caption():
    source = CaptionSource.parse({"txt": 1, "json:captions": 2})
    assert source.first(FILES) == "one"
    assert source.first({"txt": b"alt text", "json": b"{}"}) == "alt text"
    assert CaptionSource.parse({"txt": 1, "json:captions": 1}).first(FILES) == "alt text"


@pytest.mark.parametrize(
    ("key", "files", "kind"),
    [
        ("txt", {"txt": b" \t\n"}, "caption_empty"),
        ("txt", {"txt": b""}, "caption_empty"),
        ("txt", {"txt": b"caf\xe9"}, "caption_not_utf8"),
        ("txt", {}, "caption_missing"),
        ("json:a", {"json": b'{"a": []}'}, "caption_empty"),
        ("json:a", {"json": b'{"a": ["", " "]}'}, "caption_empty"),
        ("json:a", {"json": b'{"a": null}'}, "caption_empty"),
        ("json:a", {"json": b'{"b": "x"}'}, "caption_missing"),
        ("json:a", {"json": b"not json"}, "caption_missing"),
        ("json:a", {"json": b"[" * 100_000}, "caption_missing"),
        ("json:a", {"json": b"\xff"}, "caption_not_utf8"),
    ],
)
def test_what_is_wrong_with_a_caption(key, files, kind):
    source = CaptionSource.parse(key)
    for read in (source.first, lambda files: source.draw(files, 0.5)):
        with pytest.raises(UnusableCaption) as caught:
            read(files)
        assert caught.value.kind == kind


def test_where_no_key_has_a_caption_the_drawn_ones_fault_counts():
    source = CaptionSource.parse({"txt": 1, "json:a": 1})
    for uniform, kind in ((0.2, "caption_empty"), (0.8, "caption_missing")):
        with pytest.raises(UnusableCaption) as caught:
            source.draw({"txt": b""}, uniform)
        assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "neither an extension"),
        ("json:", "neither an extension"),
        ("txt:a", "neither an extension"),
        ({}, "neither a key such as txt nor a mapping"),
        (["txt"], "neither a key such as txt nor a mapping"),
        ({"txt": 0}, "txt has the weight 0, which is not a positive number"),
        ({"txt": float("nan")}, "not a positive number"),
        ({"txt": 0.7, "json": "synthetic: 0.3"}, r"json\\:path"),
    ],
)
def test_configs_that_mean_nothing(config, message):
    with pytest.raises(ConfigError, match=message):
        CaptionSource.parse(config)


@given(st.text(), st.floats(0, 1), uniforms)
def test_dropping_words_keeps_some_of_them_in_order(caption, rate, uniform):
    words, kept = caption.split(), drop_words(caption, rate, uniform).split()
    remaining = iter(words)
    assert all(word in remaining for word in kept)
    assert bool(kept) == bool(words)
    assert drop_words(caption, rate, uniform).split() == kept


def test_as_many_words_go_as_were_asked_for():
    caption = " ".join(map(str, range(20)))
    kept = Counter(word for uniform in UNIFORMS for word in drop_words(caption, 0.3, uniform).split())
    assert len(kept) == 20
    assert all(count == pytest.approx(700, abs=75) for count in kept.values())


def test_the_ends_of_the_rate():
    caption = "two  blanks stay"
    assert drop_words(caption, 0, 0.4) == caption
    assert {drop_words(caption, 1, uniform) for uniform in UNIFORMS} == {"two", "blanks", "stay"}
