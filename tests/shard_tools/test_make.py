import json
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.compat import WebDataset

from clip_train.data.index import load_indexes
from clip_train.data.pairs import PairReader
from clip_train.errors import ConfigError, DataError
from clip_train.shard_tools import make as make_module
from clip_train.shard_tools.damage import read_damages
from tests.conftest import encode_image
from tests.shard_tools.options import NUM_PICTURES, make, write_table


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(make_module, "_SAMPLES_PER_PART", 7)


def read_shards(folder) -> list[list[dict]]:
    return [list(WebDataset(str(path), shardshuffle=False)) for path in sorted(Path(folder).glob("*.tar"))]


def captions(shards: list[list[dict]]) -> list[str]:
    return [sample["txt"].decode() for shard in shards for sample in shard]


@given(
    count=st.integers(1, 40),
    bad=st.sets(st.integers(0, 39)),
    layout=st.one_of(
        st.fixed_dictionaries({"samples_per_shard": st.integers(1, 45)}),
        st.fixed_dictionaries({"num_shards": st.integers(1, 6)}),
    ),
)
@settings(max_examples=25)
def test_shards_are_balanced_and_hold_every_usable_row_in_order(tmp_path_factory, count, bad, layout):
    folder = tmp_path_factory.mktemp("make")
    usable = [row for row in range(count) if row not in bad]
    table = write_table(folder, count, bad)
    if not usable or layout.get("num_shards", 1) > len(usable):
        with pytest.raises(DataError):
            make(table, folder / "shards", max_bad_fraction=1, **layout)
        return
    made = make(table, folder / "shards", max_bad_fraction=1, **layout)
    shards = read_shards(folder / "shards")
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    if "num_shards" in layout:
        assert len(sizes) == layout["num_shards"]
    else:
        assert len(sizes) == -(-len(usable) // layout["samples_per_shard"])
    assert captions(shards) == [f"caption {row}" for row in usable]
    samples = [sample for shard in shards for sample in shard]
    assert [sample["png"] for sample in samples] == [encode_image(row % NUM_PICTURES) for row in usable]
    assert [sample["__key__"] for sample in samples] == [f"{row:09d}" for row in usable]
    assert json.loads((folder / "shards" / "sizes.json").read_text()) == made.sizes
    assert list(made.sizes.values()) == sizes
    assert [damage.key for damage in made.skipped] == [f"{row:09d}" for row in range(count) if row in bad]
    assert made.num_bytes == sum(path.stat().st_size for path in (folder / "shards").glob("*.tar"))


def test_training_can_read_them(tmp_path):
    make(write_table(tmp_path, 20), tmp_path / "shards", num_shards=3)
    shards = sorted(str(path) for path in (tmp_path / "shards").glob("*.tar"))
    reader = PairReader(load_indexes(shards), "jpg;png", "txt")
    assert (reader.counts, reader.num_incomplete) == ([6, 7, 7], 0)
    assert json.loads((tmp_path / "shards" / "00001_stats.json").read_text())["successes"] == 7


def test_the_number_of_workers_does_not_change_a_byte(tmp_path):
    table = write_table(tmp_path, 30, bad=[3, 4])
    for workers in (1, 2):
        make(table, tmp_path / str(workers), num_shards=3, max_bad_fraction=0.1, shuffle=True, num_workers=workers)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.is_file()} for n in ("1", "2"))
    assert one == two


def test_shuffled_by_seed(tmp_path):
    table = write_table(tmp_path, 40)
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(table, tmp_path / name, shuffle=True, seed=seed)
        orders.append(captions(read_shards(tmp_path / name)))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(f"caption {row}" for row in range(40))


@pytest.mark.parametrize("interrupted", ["write_part", "cut_shard"])
def test_an_interrupted_make_goes_on_and_ends_the_same(tmp_path, monkeypatch, interrupted):
    table = write_table(tmp_path, 40, bad=[11])
    changes = {"samples_per_shard": 6, "max_bad_fraction": 0.1}
    make(table, tmp_path / "whole", **changes)
    original, calls = getattr(make_module, interrupted), []

    def fail_at_the_fourth(task):
        calls.append(task)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(task)

    monkeypatch.setattr(make_module, interrupted, fail_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        make(table, tmp_path / "cut", **changes)
    assert not (tmp_path / "cut" / "sizes.json").exists()
    made = make(table, tmp_path / "cut", **changes)
    assert len(calls) == 4 + {"write_part": 6, "cut_shard": 7}[interrupted] - 3  # what was done is not done again
    whole, cut = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "cut"))
    assert whole == cut
    assert len(made.skipped) == 1


def test_a_finished_make_is_left_as_it_is(tmp_path):
    table = write_table(tmp_path, 10)
    first = make(table, tmp_path / "shards")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.tar")}
    assert make(table, tmp_path / "shards", num_workers=2) == first
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_folder_of_another_make_is_refused(tmp_path):
    table = write_table(tmp_path, 10)
    make(table, tmp_path / "shards")
    with pytest.raises(DataError, match="holds another make \\(there seed=0\\)"):
        make(table, tmp_path / "shards", seed=1)
    write_table(tmp_path, 11)
    with pytest.raises(DataError, match="of other records"):
        make(table, tmp_path / "shards")
    (tmp_path / "shards" / "make.json").unlink()
    with pytest.raises(DataError, match="already holds shards"):
        make(table, tmp_path / "shards")


def test_too_many_bad_records_stop_it_before_all_is_read(tmp_path, monkeypatch):
    table = write_table(tmp_path, 70, bad=range(1, 70, 2))
    calls = []
    original = make_module.write_part
    monkeypatch.setattr(make_module, "write_part", lambda task: calls.append(task) or original(task))
    with pytest.raises(DataError, match=r"max_bad_fraction=0.1; first: .*bad.png: unreadable image.*skipped.csv"):
        make(table, tmp_path / "shards", max_bad_fraction=0.1)
    assert len(calls) == 3
    assert not list((tmp_path / "shards").glob("*.tar"))
    assert len(read_damages(tmp_path / "shards" / "skipped.csv")) == 10
    assert len(make(table, tmp_path / "shards", max_bad_fraction=0.5).skipped) == 35


def test_kinds_of_bad_records_in_a_folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("good", "no_text", "empty", "latin", "damaged"):
        (folder / f"{name}.png").write_bytes(encode_image(1))
        (folder / f"{name}.txt").write_text("a caption")
    (folder / "no_text.txt").unlink()
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "damaged.png").write_bytes(b"")
    made = make(folder, tmp_path / "shards", max_bad_fraction=0.9)
    assert {damage.key: damage.kind for damage in made.skipped} == {
        "no_text": "caption_missing",
        "empty": "caption_empty",
        "latin": "caption_not_utf8",
        "damaged": "image_unreadable",
    }
    assert captions(read_shards(tmp_path / "shards")) == ["a caption"]


def test_kinds_of_bad_rows_in_a_table(tmp_path):
    (tmp_path / "a.png").write_bytes(encode_image(1))
    cells = [("a.png", "good"), ("", "x"), ("none.png", "x"), ("a.png", " "), ("a.png", "\ud800")]
    rows = [json.dumps({"path": path, "caption": caption}) for path, caption in cells]
    (tmp_path / "table.jsonl").write_text("\n".join(rows))
    made = make(tmp_path / "table.jsonl", tmp_path / "shards", max_bad_fraction=0.9)
    kinds = [damage.kind for damage in made.skipped]
    assert kinds == ["image_missing", "image_missing", "caption_empty", "caption_not_utf8"]


def test_json_of_columns_of_several_captions_and_of_a_folder(tmp_path):
    make(write_table(tmp_path, 2), tmp_path / "table", save_additional_columns=["licence"])
    first, second = (json.loads(sample["json"]) for sample in read_shards(tmp_path / "table")[0])
    assert first == {"key": "000000000", "caption": "caption 0", "licence": "licence 0", "width": 20, "height": 16}
    assert second["licence"] == "licence 1"

    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "0.png", "captions": ["one", "two"]}))
    make(tmp_path / "list.jsonl", tmp_path / "list")
    ((sample,),) = read_shards(tmp_path / "list")
    assert (sample["txt"], json.loads(sample["json"])["captions"]) == (b"one", ["one", "two"])

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode_image(1))
    (folder / "a.txt").write_text("a caption")
    (folder / "a.json").write_text(json.dumps({"captions": ["a", "b"], "width": 4000}))
    make(folder, tmp_path / "with", save_additional_columns="all")
    make(folder, tmp_path / "without")
    ((sample,),) = read_shards(tmp_path / "with")
    assert json.loads(sample["json"])["captions"] == ["a", "b"]
    assert json.loads(sample["json"])["width"] == 20
    assert "json" not in read_shards(tmp_path / "without")[0][0]


def test_the_parts_go_as_the_shards_come(tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    most, original = [], make_module.cut_shard

    def weigh(task):
        done = original(task)
        most.append(sum(path.stat().st_size for path in folder.rglob("*.tar")))
        return done

    monkeypatch.setattr(make_module, "cut_shard", weigh)
    made = make(write_table(tmp_path, 140), folder, samples_per_shard=7)
    assert max(most) < 1.3 * made.num_bytes
    assert not (folder / ".parts").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_shards": 2, "samples_per_shard": 2}, "both given"),
        ({"num_shards": 0}, "num_shards=0"),
        ({"seed": -1}, "seed=-1"),
        ({"max_bad_fraction": 2}, "max_bad_fraction=2"),
        ({"num_workers": "many"}, "num_workers=many"),
    ],
)
def test_values_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(write_table(tmp_path, 3), tmp_path / "shards", **changes)
    assert not (tmp_path / "shards").exists()


def test_an_output_that_cannot_be_written(tmp_path):
    table = write_table(tmp_path, 3)
    with pytest.raises(DataError, match="cannot be written"):
        make(table, os.path.join(table, "shards"))


@pytest.mark.parametrize("room", [10_000, 60_000])  # for not even a part, or for parts but no shard
def test_no_room_is_one_line_and_leaves_no_half_shard(tmp_path, room):
    table, output = write_table(tmp_path, 40), tmp_path / "shards"
    make(table, tmp_path / "whole", num_shards=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(DataError, match=rf"output={output} cannot be written: File too large; .*") as error:
            make(table, output, num_shards=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert {path.name for path in output.iterdir()} == {"make.json", ".parts"}
    assert all(path.suffix in (".tar", ".json") for path in (output / ".parts").iterdir())
    make(table, output, num_shards=1)
    assert (output / "00000.tar").read_bytes() == (tmp_path / "whole" / "00000.tar").read_bytes()
