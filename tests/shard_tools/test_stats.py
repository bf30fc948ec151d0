import json

import numpy as np
import pytest
from PIL import Image

from clip_train.errors import DataError
from clip_train.shard_tools.sheets import draw_histograms, draw_samples
from clip_train.shard_tools.stats import count_tokens, distribution, measure_shards, summarize
from tests.conftest import encode_image, write_shard
from tests.shard_tools.options import access, select


def sample(number: int, caption: str, size: tuple[int, int] = (20, 16)) -> dict:
    return {"__key__": f"{number:06d}", "png": encode_image(number, size), "txt": caption}


def measure(shards, num_workers: int = 1, **changes):
    return measure_shards(shards, select(**changes), access(), num_workers)


def test_numbers(tmp_path):
    captions = ["a cat", "a cat", "a dog runs fast", "word " * 100]
    sizes = [(20, 16), (20, 16), (40, 20), (10, 40)]
    samples = [sample(number, *pair) for number, pair in enumerate(zip(captions, sizes))]
    shards = [write_shard(tmp_path / "0.tar", samples[:3]), write_shard(tmp_path / "1.tar", samples[3:])]
    summary = summarize(measure(shards))
    assert (summary["num_shards"], summary["num_samples"], summary["num_measured"]) == (2, 4, 4)
    assert summary["shard_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    encoded = [len(encode_image(number, size)) for number, size in enumerate(sizes)]
    assert summary["bytes_by_extension"] == {"png": sum(encoded), "txt": sum(map(len, captions))}
    assert summary["image_bytes"]["mean"] == pytest.approx(np.mean(encoded))
    assert (summary["image_width"]["max"], summary["image_height"]["max"]) == (40, 40)
    assert (summary["aspect_ratio"]["min"], summary["aspect_ratio"]["max"]) == (0.25, 2)
    assert summary["caption_words"]["mean"] == (2 + 2 + 4 + 100) / 4
    assert summary["caption_tokens"]["max"] == 102
    assert summary["over_context_length_fraction"] == 0.25
    assert summary["duplicate_caption_fraction"] == 0.5
    assert summary["most_common_captions"] == {"a cat": 2}
    assert (summary["num_without_image"], summary["num_without_caption"], summary["download"]) == (0, 0, None)
    json.dumps(summary, allow_nan=False)


def test_samples_that_cannot_be_used_are_counted_apart(tmp_path):
    samples = [sample(0, "a cat"), {**sample(1, "a dog"), "png": b"junk"}, sample(2, " ")]
    measured = measure([write_shard(tmp_path / "0.tar", samples)])
    summary = summarize(measured)
    assert (summary["num_measured"], summary["num_without_image"], summary["num_without_caption"]) == (3, 1, 1)
    draw_samples(tmp_path / "samples.png", measured, select(), "title")


def test_all_captions_of_a_list_count(make_shards):
    summary = summarize(measure(make_shards([3]), caption_key="json:captions"))
    assert (summary["num_measured"], summary["num_captions"]) == (3, 6)


def test_a_random_part_by_seed(make_shards):
    shards = make_shards([300, 300])
    parts = [measure(shards, workers, num_samples=40, seed=seed) for workers, seed in ((1, 0), (2, 0), (1, 1))]
    assert [len(part.samples) for part in parts] == [40] * 3
    one, two, other = (sorted(part.captions()) for part in parts)
    assert one == two != other


def test_img2dataset_notes_are_summed(make_shards, tmp_path):
    shards = make_shards([3, 3])
    for number, failed in enumerate((1, 2)):
        note = {"count": 3 + failed, "successes": 3, "status_dict": {"success": 3, "HTTP Error 404": failed}}
        (tmp_path / "shards" / f"{number:05d}_stats.json").write_text(json.dumps(note))
    (tmp_path / "shards" / "merged_stats.json").write_text("[]")
    download = summarize(measure(shards))["download"]
    assert download == {"count": 9, "successes": 6, "status": {"success": 6, "HTTP Error 404": 3}}


def test_a_damaged_shard_is_an_error(make_shards):
    shards = make_shards([3, 3])
    with open(shards[1], "r+b") as file:
        file.truncate(3000)
    with pytest.raises(DataError, match=r"cut short.*clip-shards verify"):
        measure(shards)


def test_tokens_are_counted_with_start_and_end():
    assert count_tokens(["", "cat", "! !", "cat " * 2000]).tolist() == [2, 3, 4, 1024]
    assert count_tokens([]).tolist() == []
    assert distribution([]) is None


@pytest.mark.parametrize("count", [1, 7, 60])
def test_sheets_take_any_number_and_any_caption(tmp_path, count):
    captions = ["$5 \\frac{", "a " * 500, "lone \ud800", "x" * 300, "猫が座っている", "a cat"]
    samples = [
        {**sample(i, "", (20 + 40 * (i % 3), 16 + 90 * (i % 2))), "json": {"caption": captions[i % 6]}}
        for i in range(count)
    ]
    shard = write_shard(tmp_path / "0.tar", samples)
    measured = measure([shard], caption_key="json:caption")
    assert summarize(measured)["num_captions"] == count
    draw_samples(tmp_path / "samples.png", measured, select(caption_key="json:caption"), "title")
    draw_histograms(tmp_path / "histograms.png", measured, "title")
    for name in ("samples.png", "histograms.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 1000
    assert not list(tmp_path.glob("*.tmp*"))
