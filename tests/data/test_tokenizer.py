import io
import json
import random
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip_train.data.demo import unpack_demo
from clip_train.data.tokenizer import END_ID, LONG_CAPTIONS, START_ID, ClipTokenizer, clean_caption
from clip_train.errors import ConfigError

ODD = [
    "",
    "   ",
    "word " * 500,
    "A CAT'S DON'T we'll I'VE 'tis 12345 3.14",
    "&amp;lt;b&amp;gt; it&#39;s &eacute; &nbsp; &bogus;",
    "caf\u00e9 Ã©tÃ© naïve İstanbul ﬁ ǅ ſ'ſ ͅo·˗",
    "tab\tnew\nline\r\u00a0\u2003\u200b wide",
    "“smart” ‘quotes’ … – — ™ ©",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇭 ✊🏿 1️⃣",
    "日本語 한국어 русский العربية हिन्दी ไทย",
    "<start_of_text> in the <end_of_text> middle",
    "\x1b[31mred\x1b[0m control \x07",
    "a" * 300,
    "!?!?!?...,,,;;;###@@@$$$%%%",
]


def strings_in(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in strings_in(part)]


def captions_of_shards(folder: Path) -> list[str]:
    captions = set()
    for shard in sorted(folder.rglob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith((".txt", ".json")):
                    text = io.TextIOWrapper(archive.extractfile(member), "utf-8").read()  # pyright: ignore
                    captions.update(strings_in(json.loads(text)) if member.name.endswith(".json") else [text])
    return sorted(captions)


def invented(count: int) -> list[str]:
    """Random strings of assigned characters: words, punctuation, scripts, emoji."""
    generator = random.Random(0)
    letters = [c for c in map(chr, range(32, 0x2FFF)) if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    pools = [letters[:95], letters[:500], letters, [chr(c) for c in range(0x1F300, 0x1F64F)] + letters[:95]]
    strings = ("".join(generator.choices(generator.choice(pools), k=generator.randrange(60))) for _ in range(count))
    # Mending broken Unicode may yield characters that some Unicode version does not know yet.
    return [s for s in strings if not any(unicodedata.category(c) == "Cn" for c in clean_caption(s))]


def assert_equal_to_open_clip(captions: list[str], context_length: int) -> None:
    ours = ClipTokenizer(context_length)(captions)
    theirs = open_clip.get_tokenizer("ViT-B-32", context_length=context_length)(captions).numpy()
    different = [caption for caption, a, b in zip(captions, ours, theirs) if not np.array_equal(a, b)]
    assert not different


def test_ids_equal_open_clips_on_many_captions():
    captions = ODD + invented(8000) + captions_of_shards(Path(unpack_demo("demo:emoji")))
    assert len(captions) >= 10_000
    assert_equal_to_open_clip(captions, 77)


@pytest.mark.slow
def test_ids_equal_open_clips_on_the_development_data():
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("extra check: the development data is not beside this checkout")
    assert_equal_to_open_clip(captions_of_shards(folder), 77)


@pytest.mark.parametrize("context_length", [2, 3, 8, 16, 128])
def test_any_context_length(context_length):
    assert_equal_to_open_clip(ODD, context_length)


def test_truncation_keeps_the_end_token():
    (ids,) = ClipTokenizer(10)(["word " * 500])
    assert (ids[0], ids[-1]) == (START_ID, END_ID)
    assert (ids[1:-1] == ids[1]).all()


def test_clean_fast_path_equals_the_slow_one():
    for caption in ("plain words", "two  spaces ", "MiXed Case 12!"):
        assert clean_caption(caption) == clean_caption(caption + " é").removesuffix("é").strip()


def test_no_captions():
    assert ClipTokenizer(8)([]).shape == (0, 8)


uniforms = st.floats(0, 1, exclude_max=True)
LONG = "One red cat. Two dogs ran! Did three birds sing? Four fish, of 1.5 kg each. The fifth sentence ends it."


def words_of(ids: np.ndarray) -> list[int]:
    """The ids between start and end token, which must be there, with nothing but padding after."""
    assert ids[0] == START_ID
    end = ids.tolist().index(END_ID)
    assert not ids[end + 1 :].any()
    return ids[1:end].tolist()


def all_ids(caption: str) -> list[int]:
    return words_of(ClipTokenizer(1000)([caption])[0])


@pytest.mark.parametrize("long_captions", LONG_CAPTIONS)
def test_captions_that_fit_are_left_alone(long_captions):
    captions = ["", "a red cat", LONG]
    expected = open_clip.get_tokenizer("ViT-B-32", context_length=77)(captions).numpy()
    for draw in (0.0, 0.5, 0.99):
        assert np.array_equal(ClipTokenizer(77, long_captions)(captions, [draw] * 3), expected)


@pytest.mark.parametrize("long_captions", LONG_CAPTIONS)
def test_without_draws_long_captions_are_truncated(long_captions):
    assert np.array_equal(ClipTokenizer(12, long_captions)(ODD), ClipTokenizer(12)(ODD))
    assert np.array_equal(ClipTokenizer(12)(ODD, np.linspace(0, 0.9, len(ODD)).tolist()), ClipTokenizer(12)(ODD))


@given(uniforms, st.integers(2, 30))
def test_random_crop_is_a_full_window_of_the_caption(draw, context_length):
    whole, room = all_ids(LONG), context_length - 2
    kept = words_of(ClipTokenizer(context_length, "random_crop")([LONG], [draw])[0])
    assert kept in [whole[first : first + room] for first in range(len(whole) - room + 1)]


def test_random_crop_reaches_both_ends_alike():
    whole, draws = all_ids(LONG), (np.arange(1000) / 1000).tolist()
    rows = ClipTokenizer(len(whole), "random_crop")([LONG] * 1000, draws)  # two ids too many: three windows
    firsts = [words_of(row)[0] for row in rows]
    assert [firsts.count(first) for first in whole[:3]] == [334, 333, 333]


SENTENCES = [part.strip() for part in LONG.replace("!", "!|").replace("?", "?|").replace(". ", ".|").split("|")]


@given(uniforms, st.integers(3, 30))  # the whole has 29 ids, and start and end
def test_sentences_are_whole_and_as_many_as_fit(draw, context_length):
    number = int(draw * len(SENTENCES))
    best: list[int] = []
    for last in range(number + 1, len(SENTENCES) + 1):
        joined = all_ids(" ".join(SENTENCES[number:last]))
        best = joined if len(joined) <= context_length - 2 or not best else best
    kept = words_of(ClipTokenizer(context_length, "sentence")([LONG], [draw])[0])
    assert kept == best[: context_length - 2]


def test_a_sentence_that_does_not_fit_alone_is_truncated():
    caption = "Short one. " + "word " * 30
    kept = words_of(ClipTokenizer(10, "sentence")([caption], [0.9])[0])
    assert kept == all_ids("word " * 8)


def test_quotes_and_other_scripts_end_sentences_too():
    starts = {words_of(ClipTokenizer(5, "sentence")(['He said "no." Then left'], [d])[0])[0] for d in (0.1, 0.9)}
    assert starts == {all_ids("he")[0], all_ids("then")[0]}
    assert words_of(ClipTokenizer(6, "sentence")(["赤い猫。青い犬"], [0.9])[0])[0] == all_ids("青い犬")[0]


def test_unknown_treatment_of_long_captions():
    with pytest.raises(ConfigError, match="long_captions=cut is none of truncate, random_crop, sentence"):
        ClipTokenizer(8, "cut")


@pytest.mark.parametrize(
    "caption", ["a photo of 2 cats !", "caf\u00e9 naïve \u65e5\u672c\u8a9e", "red , green ; </w> \U0001f468"]
)
def test_decoding_gives_the_words_back(caption):
    tokenizer = ClipTokenizer(40)
    row = tokenizer([caption])[0]
    assert tokenizer.decode(row.tolist()).replace(" ", "") == caption.replace(" ", "")
    assert tokenizer.decode(row.tolist()) == open_clip.decode(torch.from_numpy(row[1:])).split("<end")[0].strip()
    assert tokenizer.decode([START_ID, END_ID, 320, 320]) == ""
