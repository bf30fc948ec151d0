import json
from pathlib import Path

import pytest

from clip_train.data.class_names import ClassNames
from clip_train.data.index import load_indexes
from clip_train.data.labelled import open_labelled, set_name, shard_patterns
from clip_train.data.shards import expand_shards
from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.labelled_set import LabelledSet
from tests.conftest import encode_image, write_shard
from tests.data.failing_server import Fault

FRUIT = ClassNames(("apple", "red pear"), ("{}",))


def write_wds(folder: Path, shards: int = 2) -> Path:
    """A set as clip-benchmark exports them, of two pictures per shard."""
    (folder / "test").mkdir(parents=True)
    for number in range(shards):
        samples = [{"__key__": f"s{number}{i}", "png": encode_image(i), "cls": str(i)} for i in range(2)]
        write_shard(folder / "test" / f"{number}.tar", samples)
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    (folder / "classnames.txt").write_text("apple\nred pear\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n")
    return folder


def write_folders(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{number}.PNG").write_bytes(encode_image(number))
    return folder


def opened(address: Path | str, classes: ClassNames | None = None):
    return open_labelled(
        str(address),
        "test",
        image_key="jpg;png",
        open_shards=lambda patterns: load_indexes(expand_shards(patterns, "data")),
        choose_classes=(lambda own: own()) if classes is None else (lambda own: classes),
    )


def labels(address: Path | str, classes: ClassNames | None = None) -> list[int]:
    reader = opened(address, classes)
    return [reader.read(shard, n).label() for shard, count in enumerate(reader.counts) for n in range(count)]


def test_a_wds_folder_is_read_by_its_number_of_shards(tmp_path):
    folder = write_wds(tmp_path / "wds_fruit")
    assert labels(folder) == [0, 1, 0, 1]
    (classes,) = opened(folder).classes
    assert classes is not None and classes.captions(1) == ["a photo of red pear"]
    assert labels(f"{folder}/test/*.tar") == labels(f"{folder}/test/1.tar") * 2
    (folder / "test" / "1.tar").unlink()
    with pytest.raises(DataError, match=r"1\.tar does not exist"):
        opened(folder)
    (folder / "test" / "nshards.txt").write_text("two")
    with pytest.raises(DataError, match=r"nshards\.txt says b'two'"):
        opened(folder)
    (folder / "test" / "nshards.txt").unlink()
    assert labels(folder) == [0, 1]  # as many as there are


def test_a_wds_url_is_read_by_its_number_of_shards(server):
    server.add("/wds/test/nshards.txt", b"3")
    assert shard_patterns(f"{server.url}/wds/", "test") == [f"{server.url}/wds/test/{n}.tar" for n in range(3)]
    assert shard_patterns(f"{server.url}/wds/0.tar", "test") == f"{server.url}/wds/0.tar"
    with pytest.raises(DataError, match=r"there is no train/nshards\.txt"):
        shard_patterns(f"{server.url}/wds", "train")


def test_class_folders_are_named_by_their_names(tmp_path):
    folder = write_folders(tmp_path / "fruit", "red_pear", "apple")
    (classes,) = opened(folder).classes
    assert classes is not None and classes.names == ("apple", "red pear")
    assert labels(folder) == [0, 1]
    assert opened(folder).name(0, 1) == str(folder / "red_pear" / "0.PNG")
    (folder / "classes.json").write_text(json.dumps({"classnames": ["red pear", "apple", "plum"]}))
    assert labels(folder) == [1, 0]
    assert labels(write_folders(tmp_path / "parts" / "test", "apple", "red_pear").parent) == [0, 1]


def test_names_above_a_part_hold_for_class_folders_as_for_shards(tmp_path):
    names = json.dumps({"classnames": ["red pear", "apple"]})
    folder = write_folders(tmp_path / "parts" / "test", "apple", "red_pear").parent
    (folder / "classes.json").write_text(names)
    assert labels(folder) == labels(folder / "test") == [1, 0]
    (folder / "test" / "classes.json").write_text(json.dumps({"classnames": ["apple", "red pear"]}))
    assert labels(folder) == [0, 1]
    shards = write_wds(tmp_path / "wds")
    (shards / "classes.json").write_text(names)
    (classes,) = opened(shards).classes
    assert classes is not None and classes.names == ("red pear", "apple")


def test_shards_without_labels_are_none_of_a_labelled_set(make_shards):
    (shard,) = make_shards([2])
    with pytest.raises(DataError, match=rf"^data: {shard} has no labels \(cls files\)"):
        opened(shard, FRUIT)


def test_class_names_elsewhere_are_asked_for_as_often_as_said(server):
    server.add("/names.txt", b"apple")
    server.faults["/names.txt"] = [Fault(503)] * 9
    chosen = LabelledSet("test", None, f"{server.url}/names.txt", None, None, "en")
    with pytest.raises(DataError, match="given up after 2 attempts"):
        chosen.choose_classes(lambda: FRUIT, retries=1)
    server.faults["/wds/test/nshards.txt"] = [Fault(503)] * 9
    with pytest.raises(DataError, match="given up after 3 attempts"):
        shard_patterns(f"{server.url}/wds", "test", retries=2)


def test_class_folders_with_other_names_are_taken_in_their_order(tmp_path):
    folder = write_folders(tmp_path / "fruit", "n02", "n01")
    assert labels(folder, FRUIT) == [0, 1]
    folder = write_folders(tmp_path / "three", "apple", "plum", "red_pear")
    with pytest.raises(DataError, match="3 class folders and there are 2 classes: 'plum' names none of them"):
        opened(folder, FRUIT)


def test_a_folder_of_neither_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"neither shards \(\*\.tar\) nor folders of pictures \(jpg;png\)"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("a/food", "food"),
        ("a/food/", "food"),
        ("a/food/*.tar", "food"),
        ("a/wds_food/test/{0..3}.tar", "wds_food"),
        ("https://host/wds_food/resolve/test/0.tar", "resolve"),
        ("https://host/sets/wds_food/resolve/main", "wds_food"),
        ("https://host/sets/wds_food/resolve/main/", "wds_food"),
        ("https://host/sets/wds_food/resolve/main/test/{0..3}.tar", "wds_food"),
        ("https://host/sets/many/resolve/main/food/test/0.tar", "food"),
        ("a/resolve/main", "main"),
    ],
)
def test_a_set_is_named_after_its_folder(address, name):
    assert set_name(address, "test") == name


def test_a_class_may_have_prompts_of_its_own():
    classes = ClassNames(("a", "b"), (), (("one", "two"), ("three", "four")))
    assert classes.captions(1) == ["three", "four"]
    assert [[part.captions(n) for n in (0, 1)] for part in classes.one_caption_each()] == [
        [["one"], ["three"]],
        [["two"], ["four"]],
    ]
    with pytest.raises(ConfigError, match="class 'b' has 1 prompts and 'a' 2"):
        ClassNames(("a", "b"), (), (("one", "two"), ("three",))).one_caption_each()
