import csv
import json
import os
import sys

import pytest

from clip_train.errors import ConfigError, DataError
from clip_train.shard_tools.source import TableColumns, read_source
from tests.shard_tools.options import options

ROWS = [{"filepath": f"{i}.jpg", "caption": f"caption, {i}", "licence": i % 2} for i in range(3)]


def columns(**changes) -> TableColumns:
    return options(TableColumns, "make", **changes)


@pytest.fixture
def table(tmp_path):
    """Write rows as a table of the kind of a suffix."""

    def write(suffix: str, rows: list[dict] = ROWS) -> str:
        path = tmp_path / f"table{suffix}"
        if suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        return str(path)

    return write


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_all_kinds_of_tables_say_the_same(table, tmp_path, suffix):
    records = read_source(table(suffix), columns(save_additional_columns=["licence"]))
    assert [record.key for record in records] == ["000000000", "000000001", "000000002"]
    assert [record.image for record in records] == [str(tmp_path / f"{i}.jpg") for i in range(3)]
    assert [record.captions for record in records] == [(f"caption, {i}",) for i in range(3)]
    assert [str((record.columns or {})["licence"]) for record in records] == ["0", "1", "0"]


def test_open_clip_csv_with_tabs(tmp_path):
    (tmp_path / "table.csv").write_text("filepath\ttitle\na.jpg\ta cat, sitting\n")
    (record,) = read_source(str(tmp_path / "table.csv"), columns())
    assert (record.image, record.captions) == (str(tmp_path / "a.jpg"), ("a cat, sitting",))


def test_several_tables_are_one(table, tmp_path):
    table(".csv")
    (tmp_path / "table2.csv").write_text("filepath,caption\nx.jpg,last\n")
    records = read_source(f"{tmp_path}/*.csv", columns())
    assert [record.key for record in records][-1] == "000000003"
    assert records[-1].captions == ("last",)


def test_lists_of_captions_empty_cells_and_image_root(table):
    rows = [{"path": "a.jpg", "captions": ["one", "", "two"]}, {"path": None, "captions": []}, {"path": "/b.jpg"}]
    records = read_source(table(".jsonl", rows), columns(image_root="/root"))
    assert [record.image for record in records] == ["/root/a.jpg", "", "/b.jpg"]
    assert [record.captions for record in records] == [("one", "two"), (), ()]


def test_all_additional_columns(table):
    records = read_source(table(".jsonl"), columns(save_additional_columns="all"))
    assert records[1].columns == {"licence": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "file"}, r"image_column=file: .*no such column \(found: filepath, caption, licence\)"),
        ({"caption_column": "alt"}, r"caption_column=alt: .*no such column"),
        ({"save_additional_columns": ["url"]}, r"has no column url \(found"),
        ({"save_additional_columns": "some"}, "neither a list of columns nor all"),
    ],
)
def test_wrong_columns_name_those_that_are_there(table, changes, message):
    with pytest.raises((DataError, ConfigError), match=message):
        read_source(table(".csv"), columns(**changes))


def test_columns_that_cannot_be_guessed(table):
    with pytest.raises(DataError, match="Give image_column= one of file, alt"):
        read_source(table(".jsonl", [{"file": "a.jpg", "alt": "x"}]), columns())
    with pytest.raises(DataError, match="Give caption_column= one of caption, text"):
        read_source(table(".jsonl", [{"path": "a.jpg", "caption": "x", "text": "y"}]), columns())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"filepath,caption\n", "has no rows"),
        ("a.csv", b"filepath,caption\n\xff,x\n", "no CSV in UTF-8"),
        ("a.csv", b"filepath,caption\nhttp://host/a.jpg,x\n", "download with img2dataset"),
        ("a.jsonl", b'{"path": "a", "text": "b"}\n{"path\n', "a.jsonl, line 2"),
        ("a.jsonl", b"[1]\n", "line 1 is no JSON object"),
        ("a.parquet", b"junk", "no readable Parquet"),
        ("a.xlsx", b"", "neither a folder nor"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=message):
        read_source(str(tmp_path / name), columns())


def test_a_source_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_source(f"{tmp_path}/none.csv", columns())
    with pytest.raises(DataError, match="does not exist"):
        read_source(f"{tmp_path}/*.csv", columns())


def test_parquet_without_pyarrow_names_the_extra(table, monkeypatch):
    path = table(".parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[parquet\]' in the checkout"):
        read_source(path, columns())


def write_files(folder, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("content")


def test_folder_keys_are_plain_and_unique(tmp_path):
    write_files(tmp_path, "a/1.jpg", "a/1.txt", "a_1.jpg", "a/b/v1.2 (copy).PNG", "b/1.webp", "notes.md", "1.tiff")
    records = read_source(str(tmp_path), columns())
    keys = {os.path.relpath(record.image, tmp_path): record.key for record in records}
    assert keys == {
        "1.tiff": "1",
        "a/1.jpg": "a_1",
        "a/b/v1.2 (copy).PNG": "a_b_v1_2_copy_",
        "a_1.jpg": "a_1-2",
        "b/1.webp": "b_1",
    }
    assert all(record.captions is None for record in records)


def test_long_names_and_names_that_look_like_the_second_of_a_kind(tmp_path):
    write_files(tmp_path, "1.txt", "1.jpg", "1.png", "1-2.jpg", *(f"{'x' * 120}{i}/{'y' * 120}.jpg" for i in range(3)))
    keys = [record.key for record in read_source(str(tmp_path), columns())]
    assert len(set(keys)) == 6
    assert max(map(len, keys)) < 90


def test_folders_without_pictures_or_captions(tmp_path):
    with pytest.raises(DataError, match="holds no pictures"):
        read_source(str(tmp_path), columns())
    write_files(tmp_path, "a.jpg")
    with pytest.raises(DataError, match=r"no picture has its caption beside it \(looked for .*a.txt"):
        read_source(str(tmp_path), columns())
    with pytest.raises(ConfigError, match="taken whole"):
        read_source(str(tmp_path), columns(save_additional_columns=["x"]))
