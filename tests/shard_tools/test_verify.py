import json
import os
from collections import Counter

import pytest

from clip_train.errors import DataError
from clip_train.shard_tools.verify import verify_shards
from tests.conftest import encode_image, make_sample, write_shard
from tests.shard_tools.options import access, select


def verify(shards, num_workers: int = 1, **changes):
    return verify_shards(shards, select(**changes), access(), num_workers)


def without(sample: dict, extension: str) -> dict:
    return {name: value for name, value in sample.items() if name != extension}


@pytest.fixture
def damaged(tmp_path) -> list[str]:
    """Four shards: 300 samples of which ten are damaged, one cut short, one no tar, one with a damaged header."""
    half = encode_image(1, (64, 64))[:3000]
    jpeg = encode_image(1, (64, 64), "JPEG")
    changes = {
        3: lambda sample: {**sample, "png": b""},
        4: lambda sample: {**sample, "png": b"no picture"},
        5: lambda sample: {**sample, "png": half},
        6: lambda sample: {**without(sample, "png"), "jpg": jpeg[: len(jpeg) // 2]},
        100: lambda sample: without(sample, "png"),
        101: lambda sample: without(sample, "txt"),
        102: lambda sample: without(sample, "txt"),
        150: lambda sample: {**sample, "txt": " \n"},
        151: lambda sample: {**sample, "txt": b"caf\xe9"},
        299: lambda sample: {**sample, "png": b"", "txt": ""},
    }
    samples = [changes.get(number, lambda sample: sample)(make_sample(number)) for number in range(300)]
    shards = [write_shard(tmp_path / "00000.tar", samples)]
    for name in ("00001", "00003"):
        shards.append(write_shard(tmp_path / f"{name}.tar", [make_sample(number) for number in range(20)]))
    content = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(content[: len(content) // 2])
    (tmp_path / "00002.tar").write_text("no tar" * 1000)
    content = (tmp_path / "00003.tar").read_bytes()
    place = content.index(b"000007.json")
    (tmp_path / "00003.tar").write_bytes(content[:place] + b"9" + content[place + 1 :])
    return [str(tmp_path / f"{number:05d}.tar") for number in range(4)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_damage_is_counted_once(damaged, num_workers):
    found = verify(damaged, num_workers)
    assert Counter(damage.kind for damage in found.damages) == {
        "image_unreadable": 5,
        "image_missing": 1,
        "caption_missing": 2,
        "caption_empty": 2,
        "caption_not_utf8": 1,
        "shard_unreadable": 3,
    }
    assert (found.num_shards, found.num_samples, found.num_checked) == (4, 300, 300)
    assert {damage.key for damage in found.damages if damage.place == damaged[0]} == {
        f"{number:06d}" for number in (3, 4, 5, 6, 100, 101, 102, 150, 151, 299)
    }
    reasons = {damage.place[-9:]: damage.detail for damage in found.damages if not damage.key}
    assert "cut short" in reasons["00001.tar"]
    assert "not a tar" in reasons["00002.tar"]
    assert "damaged at byte" in reasons["00003.tar"]


def test_a_clean_set(make_shards):
    found = verify(make_shards([10, 7]))
    assert (found.num_samples, found.num_checked, found.damages) == (17, 17, [])
    assert found.num_bytes == sum(len(make_sample(i)["png"]) + len(make_sample(i)["txt"]) for i in range(17))


def test_a_random_part(make_shards):
    shards = make_shards([300, 300], lambda sample: {**sample, "txt": ""})
    first, again, other = (verify(shards, num_samples=50, seed=seed) for seed in (0, 0, 1))
    assert first.num_checked == len(first.damages) == 50
    assert first.damages == again.damages != other.damages
    assert {damage.place for damage in first.damages} == set(shards)
    assert len({damage.key for damage in first.damages}) == 50
    assert verify(shards, num_samples=10**9).num_checked == 600


def test_damage_behind_an_old_index_is_found_when_all_is_checked(make_shards, tmp_path):
    (shard,) = make_shards([20])
    assert not verify([shard]).damages
    times = os.stat(shard)
    with open(shard, "r+b") as file:
        content = file.read()
        file.seek(content.index(b"000007.txt"))
        file.write(b"9")
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    (damage,) = verify([shard]).damages
    assert damage.kind == "shard_unreadable"


def test_captions_in_json(make_shards):
    def change(sample: dict) -> dict:
        return sample | ({"json": {"captions": []}} if sample["__key__"] == "000002" else {})

    shards = make_shards([5], change)
    (damage,) = verify(shards, caption_key="json:captions").damages
    assert (damage.kind, damage.key) == ("caption_empty", "000002")
    assert not verify(shards, caption_key={"json:captions": 1, "txt": 1}).damages
    assert len(verify(shards, caption_key="json:title").damages) == 5


def test_keys_that_no_shard_has(make_shards):
    shards = make_shards([5])
    with pytest.raises(DataError, match=r"image_key=tiff: no shard has such files \(found: json, png, txt\)"):
        verify(shards, image_key="tiff")
    with pytest.raises(DataError, match="caption_key=text: no shard has such files"):
        verify(shards, caption_key="text")


def test_shards_as_img2dataset_writes_them(tmp_path):
    note = {"caption": "a cat", "url": "x", "key": "000000000", "status": "success", "width": 20, "height": 16}
    sample = {"jpg": encode_image(1, format="JPEG"), "txt": "a cat", "json": note}
    shard = write_shard(tmp_path / "00000.tar", [{"__key__": f"{number:09d}", **sample} for number in range(3)])
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 5, "successes": 3, "status_dict": {"success": 3}}))
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    assert verify([shard]).num_checked == 3
    assert not verify([shard], caption_key="json:caption").damages
