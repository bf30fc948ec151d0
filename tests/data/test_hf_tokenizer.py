"""Tokenizers of transformers: open_clip's ids, and our choices for long captions."""

import pickle

import numpy as np
import pytest
from open_clip.tokenizer import HFTokenizer as OpenClipTokenizer

from clip_train.data.hf_tokenizer import HFTokenizer
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.data.tokenizer_choice import choose_tokenizer
from clip_train.errors import ConfigError
from tests.data.hf_tokenizers import TEXTS, bert_tokenizer, siglip_tokenizer
from tests.data.test_tokenizer import LONG, ODD

MAKERS = {"siglip": siglip_tokenizer, "bert": bert_tokenizer}
CLEAN = ["whitespace", "lower", "canonicalize"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MAKERS.items()}


@pytest.mark.parametrize("clean", CLEAN)
@pytest.mark.parametrize("kind", list(MAKERS))
def test_ids_are_open_clips(folders, kind, clean):
    captions = [*TEXTS, *ODD, LONG, "snake_case, 'quoted' & #tagged!"]
    for length in (4, 16, 64):
        ours = HFTokenizer(folders[kind], length, clean=clean)(captions)
        theirs = OpenClipTokenizer(folders[kind], context_length=length, clean=clean)(captions).numpy()
        assert np.array_equal(ours, theirs)


def test_siglips_conventions(folders):
    tokenizer = HFTokenizer(folders["siglip"], 64, clean="canonicalize")
    same = tokenizer(["A red_cat!", "a  RED cat"])
    assert np.array_equal(same[0], same[1])
    words = int((same[0] != 1).sum())
    assert 0 < words < 20 and (same[0, words:] == 1).all()  # no start token; the end token, and padding that is one
    assert (tokenizer.pad_id, tokenizer.end_id) == (1, 1)


@pytest.mark.parametrize("clean", CLEAN)
@pytest.mark.parametrize("kind", list(MAKERS))
def test_what_is_kept_of_a_long_caption(folders, kind, clean):
    def words(captions: list[str], length: int, choice: str = "truncate", draw: float | None = None) -> list[int]:
        tokenizer = HFTokenizer(folders[kind], length, choice, clean)
        row = tokenizer(captions, None if draw is None else [draw])[0]
        return [int(i) for i in row if i not in ((1,) if kind == "siglip" else (0, 2, 3))]

    whole = words([LONG], 500)
    room = 10 - (1 if kind == "siglip" else 2)
    assert words([LONG], 10) == words([LONG], 10, "random_crop", 0.0) == whole[:room]
    assert words([LONG], 10, "random_crop", 0.999) == whole[-room:]
    last = words(["The fifth sentence ends it."], 500)
    assert words([LONG], 30, "sentence", 0.999) == last[: 30 - 10 + room]


def test_workers_get_the_same_one(folders):
    tokenizer = HFTokenizer(folders["siglip"], 16)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert np.array_equal(copy(TEXTS), tokenizer(TEXTS))
    assert HFTokenizer(folders["siglip"], 8)._tokenizer is tokenizer._tokenizer  # read once


def test_no_captions(folders):
    assert HFTokenizer(folders["bert"], 8)([]).shape == (0, 8)


def test_the_name_chooses(folders):
    assert isinstance(choose_tokenizer("clip", 77), ClipTokenizer)
    assert isinstance(choose_tokenizer(folders["bert"], 77), HFTokenizer)


@pytest.mark.parametrize(
    ("name", "length", "settings", "message"),
    [
        ("/no/such", 8, {}, "model.text.tokenizer=/no/such: none usable in a folder"),
        ("bert", 2, {}, "model.text.context_length=2 has no room for words"),
        ("bert", 8, {"clean": "wash"}, "clean=wash is none of whitespace, lower, canonicalize"),
        ("bert", 8, {"long_captions": "cut"}, "long_captions=cut is none of"),
    ],
)
def test_what_cannot_be(folders, name, length, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        HFTokenizer(folders.get(name, name), length, **settings)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_cannot_pad(tmp_path):
    with pytest.raises(ConfigError, match="has no padding token"):
        HFTokenizer(bert_tokenizer(tmp_path, pad_token=None), 8)  # pyright: ignore[reportArgumentType]
