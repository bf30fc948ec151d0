import io
import json
import random
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import open_clip
import pytest

from clip_train.data.demo import unpack_demo
from clip_train.data.tokenizer import END_ID, START_ID, ClipTokenizer, clean_caption

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
