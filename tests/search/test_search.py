"""Indexes, filters, and what is found with them, without a model."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from pyarrow import Table, parquet
from rich.console import Console

from clip_train.embedding.folder import EmbeddingFolder
from clip_train.embedding.options import IMAGE
from clip_train.errors import ConfigError, DataError
from clip_train.search import filters
from clip_train.search.index import KINDS, IndexOptions, build_index, choose_kind, index_path, read_index
from clip_train.search.pictures import read_picture
from clip_train.search.results import Answer, print_table, write_results
from clip_train.search.search import Searcher, SearchOptions
from tests.search.folders import make_folder, unit_vectors

COUNT, WIDTH = 3000, 16
EXACT_UP_TO = 300  # so that the index is asked
QUERIES = unit_vectors(20, WIDTH, seed=1)


@pytest.fixture(scope="module")
def vectors():
    return unit_vectors(COUNT, WIDTH)


@pytest.fixture(scope="module")
def folder(vectors, tmp_path_factory) -> EmbeddingFolder:
    return make_folder(tmp_path_factory.mktemp("embeddings"), vectors)


@pytest.fixture(scope="module", params=KINDS)
def searcher(request, folder) -> Searcher:
    about = build_index(folder, IMAGE, IndexOptions(kind=request.param, seed=0))
    assert (about.kind, about.count) == (request.param, COUNT)
    return Searcher(folder, IMAGE, EXACT_UP_TO)


def nearest(vectors: np.ndarray, query: np.ndarray, allowed: np.ndarray, count: int) -> list[int]:
    scores = np.where(allowed, vectors @ query, -2)
    return np.argsort(-scores, kind="stable")[:count].tolist()


def test_every_kind_finds_the_nearest_with_exact_scores(searcher, vectors):
    found = 0
    for query in QUERIES:
        hits = searcher.search(query, SearchOptions(10))
        expected = nearest(vectors, query, np.ones(COUNT, bool), 10)
        found += len({hit.number for hit in hits} & set(expected))
        assert [hit.score for hit in hits] == pytest.approx([vectors[hit.number] @ query for hit in hits], abs=1e-5)
        assert [hit.row["key"] for hit in hits] == [str(hit.number) for hit in hits]
        if searcher.index[1].kind == "flat":
            assert [hit.number for hit in hits] == expected
    assert found >= 0.9 * 10 * len(QUERIES)


def test_conditions_on_the_metadata(searcher, vectors):
    numbers = np.arange(COUNT)
    priced = numbers % 7 != 0
    for where, allowed in (
        ("price < 500 and colour == 'red'", priced & (numbers < 500) & (numbers % 2 == 1)),  # few: all are compared
        ("price is not null and key != '1'", priced & (numbers != 1)),
    ):
        found = 0
        for query in QUERIES[:5]:
            hits = [hit.number for hit in searcher.search(query, SearchOptions(10, where=where))]
            assert len(hits) == 10 and allowed[hits].all()
            found += len(set(hits) & set(nearest(vectors, query, allowed, 10)))
        assert found == 50 if where.startswith("price < 500") else found >= 45
    assert searcher.search(QUERIES[0], SearchOptions(5, where="price < 0")) == []


def test_a_condition_that_few_near_ones_meet_finds_as_many_as_there_are(searcher, vectors):
    asking_the_index = dataclasses.replace(searcher, exact_up_to=10)
    allowed = (np.arange(COUNT) % 7 != 0) & (np.arange(COUNT) < 400)
    for query in QUERIES[:5]:
        hits = [hit.number for hit in asking_the_index.search(query, SearchOptions(300, where="price < 400"))]
        assert hits == nearest(vectors, query, allowed, 300)
        hits = [hit.number for hit in asking_the_index.search(query, SearchOptions(10, where="price < 400"))]
        assert len(set(hits) & set(nearest(vectors, query, allowed, 10))) >= 9


def test_conditions_reach_nothing_but_the_metadata(folder, tmp_path):
    searcher = Searcher(folder, IMAGE)
    (tmp_path / "secret").write_text("secret")
    for where in (
        "pric < 20",
        "price <",
        "true); drop table samples; --",
        f"(select count(*) from read_text('{tmp_path}/secret')) > 0",
        "getenv('HOME') = 'x' and",
    ):
        with pytest.raises(ConfigError, match=r"^where=") as raised:
            searcher.allowed(where)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["file_index", "File_Row_Number", "clip_train_row", "clip_train_file"])
def test_a_column_that_would_stand_for_the_place_of_a_sample_is_refused(name, tmp_path):
    path = make_folder(tmp_path, unit_vectors(4, WIDTH), parts=1).metadata[0]
    table = parquet.read_table(path)
    parquet.write_table(table.append_column(name, [[3, 2, 1, 0]]), path)
    with pytest.raises(DataError, match=rf"^where= needs the name of the column '{name}'.*: write them without it"):
        Searcher(EmbeddingFolder.open(tmp_path), IMAGE).allowed("price >= 0")


def test_a_condition_that_takes_too_much_memory_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(filters, "_MEMORY", "50MB")
    monkeypatch.chdir(tmp_path)
    many = "(select count(distinct a.range * b.range) from range(9000) a, range(9000) b) > price"
    with pytest.raises(ConfigError, match=r"^where=.*Out of Memory") as raised:
        Searcher(folder, IMAGE).allowed(many)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())  # nor does it take the disk


def test_a_row_of_metadata_is_read_with_few_others(tmp_path):
    folder = make_folder(tmp_path, unit_vectors(5000, WIDTH), parts=2)
    wanted = [4999, 0, 2047, 2048, 2499, 2500]
    assert [row["key"] for row in folder.rows(wanted)] == [str(number) for number in wanted]
    about = parquet.read_metadata(folder.metadata[0])
    assert max(about.row_group(group).num_rows for group in range(about.num_row_groups)) <= 2048


def test_near_copies_are_left_out_until_enough_are_found(tmp_path):
    vectors = unit_vectors(300, WIDTH)
    query = vectors[0]
    copies = np.repeat(query[None], 500, axis=0) + np.float32(1e-4) * unit_vectors(500, WIDTH, seed=3)
    folder = make_folder(tmp_path, np.concatenate([copies, vectors]))
    searcher = Searcher(folder, IMAGE)
    assert all(hit.number < 501 for hit in searcher.search(query, SearchOptions(10)))
    hits = searcher.search(query, SearchOptions(10, deduplicate=0.99))
    assert len(hits) == 10
    build_index(folder, IMAGE, IndexOptions("flat", 0))
    assert Searcher(folder, IMAGE, exact_up_to=100).search(query, SearchOptions(10, deduplicate=0.99)) == hits
    found = folder.vectors(IMAGE, np.array([hit.number for hit in hits]))
    cosines = found @ found.T - np.eye(10)
    assert cosines.max() < 0.99
    assert hits[0].score == pytest.approx(1, abs=1e-3)


def test_an_index_of_other_embeddings_or_half_an_index_is_refused(tmp_path):
    folder = make_folder(tmp_path, unit_vectors(30, WIDTH))
    with pytest.raises(DataError, match="no whole index of its images: build it by clip-search index embeddings="):
        read_index(folder, IMAGE)
    build_index(folder, IMAGE, IndexOptions("auto", 0))
    assert read_index(folder, IMAGE)[1].kind == "flat"
    make_folder(tmp_path, unit_vectors(30, WIDTH, seed=5))
    with pytest.raises(DataError, match="is of other embeddings than there are now"):
        read_index(folder, IMAGE)
    assert np.allclose(next(folder.blocks(IMAGE))[:10], unit_vectors(30, WIDTH, seed=5)[:10], atol=1e-6)
    build_index(folder, IMAGE, IndexOptions("auto", 0))
    path = index_path(tmp_path, IMAGE)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="no whole index"):
        read_index(folder, IMAGE)
    with pytest.raises(ConfigError, match="kind=ivf_pq learns 256 centroids, and there are 30 embeddings"):
        build_index(folder, IMAGE, IndexOptions("ivf_pq", 0))


def test_the_kind_follows_from_the_size():
    assert [choose_kind(count) for count in (49_999, 50_000, 999_999, 1_000_000)] == ["flat", "hnsw", "hnsw", "ivf_pq"]


def test_folders_of_clip_retrieval_are_read_and_others_refused(tmp_path):
    folder = make_folder(tmp_path, unit_vectors(60, WIDTH), parts=12)
    for files in (folder.embeddings[IMAGE], folder.metadata):
        for number, path in enumerate(files):  # as clip-retrieval numbers them
            path.rename(path.with_name(path.name.replace(f"{number:05d}", str(number))))
    renamed = EmbeddingFolder.open(tmp_path)
    assert [row["key"] for row in renamed.rows(range(60))] == [str(i) for i in range(60)]
    assert np.array_equal(np.concatenate(list(renamed.blocks(IMAGE))), renamed.vectors(IMAGE, np.arange(60)))
    for number, path in enumerate(renamed.metadata):  # with its columns, of which it does not write all always
        columns = {"caption": [f"c{number}"] * 5, "width": [64] * 5, "shard": [7] * 5, "image_path": [None] * 5}
        parquet.write_table(Table.from_pydict(columns if number else {"caption": ["c0"] * 5}), path)
    hits = Searcher(renamed, IMAGE).search(unit_vectors(60, WIDTH)[2], SearchOptions(3, where="width is null"))
    assert [(hit.number, hit.row) for hit in hits[:1]] == [(2, {"caption": "c0"})]
    hits += Searcher(renamed, IMAGE).search(QUERIES[0], SearchOptions(60, where="width = 64"))
    assert {read_picture(hit.row) for hit in hits} == {None}
    answers = [Answer("x\udcff.png", None, hits)]  # a file's name that is not UTF-8
    print_table(answers, Console())
    for suffix in ("html", "json", "png"):
        write_results(f"{tmp_path}/found.{suffix}", answers)
    assert json.loads((tmp_path / "found.json").read_text("utf-8"))[0]["query"] == "x?.png"
    renamed.metadata[3].unlink()
    with pytest.raises(DataError, match=r"is not complete: each \.npy needs a metadata/"):
        EmbeddingFolder.open(tmp_path)
    shutil.rmtree(tmp_path / "img_emb")
    with pytest.raises(DataError, match="holds none"):
        EmbeddingFolder.open(tmp_path)
    with pytest.raises(ConfigError, match="has images only"):
        Searcher(dataclasses.replace(folder), "text")
