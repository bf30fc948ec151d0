"""The tasks of clip-eval that need no class names, on real shards and a small random model."""

import csv
import json
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from clip_train.data.long_captions import split_sentences
from clip_train.distributed import group_rank
from clip_train.errors import ClipTrainError, ConfigError, DataError
from clip_train.evaluation import moderation_task, progress, ranking_task, retrieval_ranks
from clip_train.evaluation.captioned_set import encode_texts
from clip_train.evaluation.frozen_features import Samples
from clip_train.evaluation.loaded_model import LoadedModel, load_model
from clip_train.evaluation.ranking import RankedCaption, rank_captions
from clip_train.evaluation.ranking_task import RankedImage
from clip_train.evaluation.results import Results
from clip_train.evaluation.tasks import TASKS
from clip_train.interop.model_source import ModelSource
from tests.conftest import encode_image, write_shard
from tests.evaluation.test_clip_benchmark import config
from tests.interop.tiny import CLIP, ours
from tests.labelled import make_labelled
from tests.ranks import RankPool


def load() -> LoadedModel:
    source = ModelSource(ours(CLIP), CLIP, "tiny")
    return load_model(source, torch.device("cpu"), precision="32", compile=False, batch_size=16, num_workers=0)


def run(folder: Path, task: str, *overrides: str) -> Results:
    """On this rank, or alone."""
    (folder / "out").mkdir(exist_ok=True)
    cfg = config(f"task={task}", f"output={folder}/out", f"data.cache_dir={folder}/cache", *overrides)
    return TASKS[task](load(), cfg)


@pytest.fixture(scope="module")
def pool():
    """Two ranks."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Train and test parts, with noise that makes the task hard enough."""
    folder = tmp_path_factory.mktemp("labelled")
    make_labelled(folder / "set" / "train", [40, 31], noisy)
    make_labelled(folder / "set" / "test", [33], noisy, first=1000)
    return folder


def noisy(sample: dict) -> dict:
    """Every third picture is noise."""
    number = int(sample["__key__"])
    return sample | ({"png": encode_image(number, (32, 32))} if number % 3 == 0 else {})


def cached(folder: Path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Features and labels on disk, by how many samples their set has."""
    found = {}
    for values in folder.glob("cache/features_*/00000.npy"):
        labels = np.array(json.loads(values.with_suffix(".json").read_bytes())["labels"])
        found[len(labels)] = np.load(values), labels
    return found


def test_linear_probe_and_neighbours(labelled, pool):
    results = run(labelled, "linear_probe", f"data.path={labelled}/set", "task.C=10")
    features = cached(labelled)
    times = {path: path.stat().st_mtime_ns for path in labelled.glob("cache/*/*")}
    reference = LogisticRegression(C=10, tol=1e-8, max_iter=5000).fit(*features[71])
    said, labels = reference.predict(features[33][0]), features[33][1]
    assert results.task == "linear_probe" and results.dataset == "set" and results.metrics["C"] == 10
    assert results.metrics["lp_acc1"] == pytest.approx((said == labels).mean())
    assert results.metrics["lp_mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, said))
    assert 1 / 7 < results.metrics["lp_acc1"] < results.metrics["lp_acc5"] <= 1

    searched = run(labelled, "linear_probe", f"data.path={labelled}/set")
    tried = json.loads((labelled / "out" / "regularisation.json").read_text())
    best = max(row["validation_acc1"] for row in tried)
    assert searched.metrics["C"] == next(row["C"] for row in tried if row["validation_acc1"] == best)
    assert searched.metrics["validation_acc1"] == best and len(tried) <= 15
    assert {path: path.stat().st_mtime_ns for path in labelled.glob("cache/*/*")} == times  # features are kept

    near = run(labelled, "knn", f"data.path={labelled}/set", "task.k=[1,200]", "task.features=trunk")
    units = {count: values / np.linalg.norm(values, axis=1, keepdims=True) for count, (values, _) in features.items()}
    nearest = features[71][1][(units[33] @ units[71].T).argmax(1)]
    assert near.metrics["acc1"] == pytest.approx((nearest == labels).mean())
    assert near.metrics["k"] == 1 and list(near.variants) == ["k=200"]

    for probe, neighbours in pool.run(on_a_rank, labelled):
        assert probe == pytest.approx(searched.metrics)
        assert neighbours == pytest.approx(near.variants["k=200"])


def test_the_log_tells_when_the_features_are_computed(labelled, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    run(labelled, "knn", f"data.path={labelled}/set", f"data.cache_dir={tmp_path}")
    ends = [message.partition(" in ")[0] for message in caplog.messages if " images in " in message]
    assert ends == ["71 images", "33 images"]


def on_a_rank(folder: Path) -> list[dict[str, float]]:
    probe = run(folder, "linear_probe", f"data.path={folder}/set", f"data.cache_dir={folder}/other")
    near = run(folder, "knn", f"data.path={folder}/set", "task.k=[1,200]", "task.features=trunk")
    return [dict(probe.metrics), dict(near.variants["k=200"])]


def test_probes_that_cannot_be(labelled):
    data = f"data.path={labelled}/set"
    for overrides, message in (
        (["task.train_split=test"], "these are the images that data names; give task.train="),
        (["task.features=pixels"], "task.features=pixels is none of embedding, trunk"),
        (["task.C=0"], "task.C=0.0 is not above 0"),
        (["task.validation_share=1"], "task.validation_share=1.0 is not between 0 and 1"),
        (["task.validation_share=0.01"], "task.validation_share=0.01: that is not one image of any class"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(labelled, "linear_probe", data, *overrides)
    with pytest.raises(ConfigError, match=r"task\.k=\[0\] is not a list of numbers"):
        run(labelled, "knn", data, "task.k=[0]")
    other = make_labelled(labelled / "other", [9], num_classes=3)
    with pytest.raises(ConfigError, match=r"the classes of task\.train and data differ: 3, .* 7, .*'red'"):
        run(labelled, "knn", data, f"task.train='{other}'")


TEXT = "Number {n} is a fruit. It is said to taste of {n} other fruits, and of the sea! Its colour is {colour}, mostly."


@pytest.fixture(scope="module")
def described(tmp_path_factory) -> Path:
    """Twelve pictures of six products, the two of one with the same description, longer than the context."""
    folder = tmp_path_factory.mktemp("described")
    samples = [
        {
            "__key__": f"{n:06d}",
            "png": encode_image(n),
            "json": {"description": TEXT.format(n=n % 6, colour="red" if n % 2 else "green"), "captions": ["a", "b c"]},
        }
        for n in range(12)
    ]
    write_shard(folder / "00000.tar", samples)
    return folder


def test_long_texts(described):
    data = f"data.path={described}/*.tar"
    results = run(described, "long_text", data)
    assert (results.metrics["texts"], results.metrics["longer_than_context"]) == (6, 1)
    assert list(results.variants) == ["truncate", "chunk_mean", "sliding_window", "max_pool", "hierarchical"]
    assert len({variant["image_retrieval_mean_rank"] for variant in results.variants.values()}) > 1
    for way, metrics in results.variants.items():
        assert metrics["text_retrieval_recall@10"] == 1 and metrics["text_retrieval_mean_rank"] < 6
        alone = run(described, "retrieval", data, r"task.caption_key=json\:description", f"task.long_text={way}",
                    "task.distinct_texts=true")  # fmt: skip
        assert alone.metrics == metrics
    everyone = run(described, "retrieval", data, r"task.caption_key=json\:captions", "task.recall_at=[24]")
    assert everyone.metrics["text_retrieval_recall@24"] == 1
    assert len(split_sentences(TEXT)) == 3


def test_retrieval_on_several_ranks(described, pool):
    expected = retrieval_on_a_rank(described)
    assert pool.run(retrieval_on_a_rank, described) == [expected, expected]


def retrieval_on_a_rank(folder: Path) -> dict[str, float]:
    return dict(run(folder, "retrieval", f"data.path={folder}/*.tar", r"task.caption_key=json\:captions").metrics)


def test_candidates_are_ranked_for_pictures_in_shards_and_files(described, pool, tmp_path):
    candidates = ["one fruit", "a very long caption " * 9, "the sea"]
    (tmp_path / "candidates.txt").write_text("\n\n".join([*candidates, *candidates]) + "\n")
    given = [f"data.path={described}/*.tar", f"task.candidates={tmp_path}/candidates.txt"]
    results = run(described, "rank_captions", *given)
    assert (results.metrics["images"], results.metrics["candidates"]) == (12, 3)
    ranked = json.loads((described / "out" / "ranked_captions.json").read_text())
    assert [image["key"] for image in ranked] == [f"{n:06d}" for n in range(12)]
    assert ranked[7]["image"] == f"{described}/00000.tar[7]"

    for n in range(12):
        path = tmp_path / "pictures" / f"{n:02d}" / "1.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encode_image(n))
    paths = sorted((tmp_path / "pictures").glob("*/1.png"))
    for image, expected in zip(ranked, rank_captions(load(), paths, [text.strip() for text in candidates])):
        assert [entry["caption"] for entry in image["captions"]] == [entry.caption for entry in expected]
        for key in ("cosine", "probability"):
            found = [entry[key] for entry in image["captions"]]
            assert found == pytest.approx([getattr(entry, key) for entry in expected], abs=1e-6)

    for again in pool.run(rank_on_a_rank, described, f"data.path={tmp_path}/pictures", given[1], "task.top=1"):
        assert again == pytest.approx(dict(results.metrics))
    best = json.loads((described / "out" / "ranked_captions.json").read_text())
    assert [image["image"] for image in best] == [str(path) for path in paths]
    assert [image["captions"][0]["caption"] for image in best] == [image["captions"][0]["caption"] for image in ranked]
    rows = list(csv.DictReader((described / "out" / "ranked_captions.csv").open()))
    assert [(row["key"], row["rank"]) for row in rows] == [(f"{n:02d}/1", "1") for n in range(12)]


def rank_on_a_rank(folder: Path, *given: str) -> dict[str, float]:
    return dict(run(folder, "rank_captions", *given).metrics)


def test_each_sample_may_have_candidates_of_its_own(described):
    results = run(described, "rank_captions", f"data.path={described}/*.tar")
    ranked = json.loads((described / "out" / "ranked_captions.json").read_text())
    assert results.metrics["candidates"] == 24
    for image in ranked:
        assert sorted(entry["caption"] for entry in image["captions"]) == ["a", "b c"]
        assert sum(entry["probability"] for entry in image["captions"]) == pytest.approx(1)


def test_candidates_that_cannot_be(described, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "0.png").write_bytes(encode_image(0))
    shards = f"data.path={described}/*.tar"
    for given, message in (
        (
            [shards, f"task.candidates={tmp_path}/none.txt"],
            r"^task\.candidates=.*none\.txt cannot be read: No",
        ),
        ([shards, f"task.candidates={tmp_path}/empty.txt"], r"empty\.txt has no captions: one on each line"),
        ([shards, r"task.caption_key=txt"], r"has no captions under task\.caption_key=txt"),
        ([shards, "task.top=0"], r"^task\.top=0 is not at least 1"),
        ([f"data.path={tmp_path}"], r"without captions of their own; give task\.candidates=FILE"),
    ):
        with pytest.raises(ClipTrainError, match=message):
            run(described, "rank_captions", *given)


def test_half_a_letter_is_written_as_a_question_mark(tmp_path):
    caption = RankedCaption("half \ud83d", 0.5, 1.0)
    ranking_task._write(tmp_path, [RankedImage("a\udcff.png", "a\udcff", [caption])])
    (written,) = json.loads((tmp_path / "ranked_captions.json").read_text("utf-8"))
    assert (written["image"], written["captions"][0]["caption"]) == ("a?.png", "half ?")
    assert "a?.png,a?,1,half ?,0.5,1.0" in (tmp_path / "ranked_captions.csv").read_text("utf-8")


def test_texts_that_are_the_same_are_encoded_once():
    loaded, rows = load(), []
    loaded.model.text.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    texts = [f"text {n % 20}" for n in range(50)]
    vectors = encode_texts(loaded, texts)
    assert sum(rows) == 20 and len(rows) > 1
    assert all(torch.equal(vectors[n], vectors[n % 20]) for n in range(50))
    assert len(vectors.unique(dim=0)) == 20


def test_what_only_one_rank_lacks_ends_both(described, pool, tmp_path):
    (tmp_path / "0").symlink_to(described)
    for said in pool.run(error_on_a_rank, tmp_path):
        assert said == f"data: no file matches {tmp_path}/1/*.tar"
    (tmp_path / "1").mkdir()
    write_shard(tmp_path / "1" / "00000.tar", [{"__key__": "0", "png": encode_image(0), "json": {"captions": ["a"]}}])
    for said in pool.run(error_on_a_rank, tmp_path):
        assert "the ranks see different shards" in said


def error_on_a_rank(folder: Path) -> str:
    """Where each rank has data of its own."""
    data = f"data.path={folder}/{group_rank()}/*.tar"
    with pytest.raises(DataError) as error:
        run(folder, "retrieval", data, r"task.caption_key=json\:captions")
    return str(error.value).partition(" (")[0]


@pytest.mark.parametrize("kind", ["rank_captions", "zero_shot"])
def test_ranks_that_see_other_pictures_end(kind, pool, tmp_path):
    for rank in range(2):
        for name in ("red", "blue"):
            path = tmp_path / str(rank) / "photos" / name / f"{rank}.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(encode_image(0))
    (tmp_path / "candidates.txt").write_text("a\nb\n")
    more = [f"task.candidates={tmp_path}/candidates.txt"] if kind == "rank_captions" else []
    for said in pool.run(other_pictures, tmp_path, kind, *more):
        assert said.endswith(
            "photos: the ranks see different shards, pictures or class names, or different numbers of samples"
        )


def other_pictures(folder: Path, task: str, *more: str) -> str:
    with pytest.raises(DataError) as error:
        run(folder, task, f"data.path={folder}/{group_rank()}/photos", *more)
    return str(error.value)


def test_out_of_memory_after_the_features_ends_both_ranks_in_one_line(labelled, described, pool):
    for said in pool.run(out_of_memory_on_a_rank, labelled, described):
        assert said == 4 * ["out of memory (MemoryError)"]


def out_of_memory_on_a_rank(labelled: Path, described: Path) -> list[str]:
    def fail(*_: object) -> NoReturn:
        raise MemoryError

    said = []
    for place, name, folder, given in (
        (Samples, "take", labelled, ["linear_probe", f"data.path={labelled}/set"]),
        (Samples, "take_share", labelled, ["linear_probe", f"data.path={labelled}/set", "task.C=10"]),
        (moderation_task, "_scored", labelled, ["moderation", f"data.path={labelled}/set"]),
        (retrieval_ranks, "_count_after", described,
         ["retrieval", f"data.path={described}/*.tar", r"task.caption_key=json\:captions"]),
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            if group_rank() == 1:
                patch.setattr(place, name, fail)
            with pytest.raises(DataError) as error:
                run(folder, *given)
        said.append(str(error.value))
    return said


def test_retrieval_that_cannot_be(described, tmp_path):
    data = f"data.path={described}/*.tar"
    for error, overrides, message in (
        (ConfigError, [data, "task.recall_at=[]"], r"task\.recall_at=\[\] is not a list"),
        (ConfigError, [data, "task.long_text=mean"], r"^task\.long_text=mean is none of truncate, chunk_mean"),
        (ConfigError, [data, "task.stride=99"], r"^task\.stride=99 is not a number of tokens between 1 and the 14"),
        (DataError, [data], r"has no captions under task\.caption_key=txt"),
        (ConfigError, [data, r"task.caption_key=yaml\:a"], r"^task\.caption_key='yaml:a' is neither"),
        (DataError, [data, "data.image_key=tiff"], r"has no images under data\.image_key=tiff"),
        (ConfigError, [data, "data.image_key=[png,jpg]"], r"^data\.image_key=\['png', 'jpg'\] is not extensions"),
        (ConfigError, [data, "data.image_key=null"], r"^data\.image_key=None is not extensions"),
        (ConfigError, [data, "data.retries=-1"], r"^data\.retries=-1 is negative"),
        (ConfigError, [data, "data.cache_size=much"], r"^data\.cache_size=much"),
        (ConfigError, [data, "data.timeout=soon"], r"^data\.timeout: "),
        (DataError, [f"data.path={tmp_path}"], r"there are no shards"),
    ):
        with pytest.raises(error, match=message):
            run(described, "retrieval", *overrides)
