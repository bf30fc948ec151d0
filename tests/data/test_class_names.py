import json
from pathlib import Path

import pytest

from clip_train.data.class_names import ClassNames, read_class_names
from clip_train.errors import DataError

FRUIT = ClassNames(("apple", "pear {}"), ("a photo of a {}.", "{}"))


def write_json(folder: Path, **entries) -> Path:
    path = folder / "classes.json"
    path.write_text(json.dumps({"classnames": ["apple", "pear {}"], "templates": ["a photo of a {}.", "{}"]} | entries))
    return path


def write_lines(folder: Path) -> Path:
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n\n")
    path = folder / "classnames.txt"
    path.write_text("apple\npear {}\n")
    return path


def test_a_class_has_a_caption_from_each_template():
    assert FRUIT.captions(0) == ["a photo of a apple.", "apple"]
    assert FRUIT.captions(1) == ["a photo of a pear {}.", "pear {}"]


@pytest.mark.parametrize("levels", [0, 1])
def test_found_beside_the_shards_or_above(tmp_path, levels):
    folder = tmp_path / "set" / "test"
    folder.mkdir(parents=True)
    place = (folder, folder.parent)[levels]
    write_json(place)
    assert read_class_names(None, str(folder / "0.tar")) == FRUIT
    (place / "classes.json").unlink()
    write_lines(place)
    found = read_class_names(None, str(folder / "0.tar"))
    assert found.names == FRUIT.names and [found.captions(n) for n in (0, 1)] == [FRUIT.captions(n) for n in (0, 1)]


def test_found_where_the_config_says(tmp_path):
    assert read_class_names(str(write_json(tmp_path)), "/elsewhere/0.tar") == FRUIT
    assert read_class_names(str(tmp_path), "pipe:cat 0.tar") == FRUIT
    (tmp_path / "lines").mkdir()
    assert read_class_names(str(write_lines(tmp_path / "lines")), "/elsewhere/0.tar").names == FRUIT.names


def test_found_beside_remote_shards(tmp_path, server):
    path = write_json(tmp_path)
    server.add("/set/classes.json", path.read_bytes())
    assert read_class_names(None, f"{server.url}/set/test/0.tar") == FRUIT
    assert read_class_names(f"{server.url}/set", "/elsewhere/0.tar") == FRUIT


def test_without_templates_there_is_one(tmp_path):
    write_json(tmp_path, templates=None)
    assert read_class_names(str(tmp_path), "x").captions(0) == ["a photo of a apple."]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"classnames": []}, "its class names are not a list of texts"),
        ({"classnames": ["apple", 3]}, "its class names are not a list of texts"),
        ({"templates": "a {}"}, "its templates are not a list of texts"),
        ({"templates": ["a photo"]}, "the template 'a photo' has no {} for the class name"),
    ],
)
def test_what_does_not_say_what_it_should_is_named(tmp_path, entries, message):
    with pytest.raises(DataError, match=message):
        read_class_names(str(write_json(tmp_path, **entries)), "x")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no classes.json or classnames.txt beside .*: give data.classes"):
        read_class_names(None, str(tmp_path / "a" / "0.tar"))
    with pytest.raises(DataError, match=r"data\.classes=/x/classes\.json: there is no such file"):
        read_class_names("/x/classes.json", "0.tar")
    (tmp_path / "classes.json").write_text("[")
    with pytest.raises(DataError, match="is not JSON of the form"):
        read_class_names(str(tmp_path), "0.tar")


def test_a_yaml_has_prompts_of_each_class_or_names_and_templates(tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text("apple: [an apple, a red apple]\n'pear {}': ['a pear {}']\n")
    found = read_class_names(str(path), "x")
    assert found.names == FRUIT.names
    assert [found.captions(label) for label in (0, 1)] == [["an apple", "a red apple"], ["a pear {}"]]
    path.write_text("classnames: [apple, 'pear {}']\ntemplates: ['a photo of a {}.', '{}']\n")
    assert read_class_names(str(path), "x") == FRUIT
    example = read_class_names(str(Path(__file__).parents[2] / "docs" / "examples" / "prompts.yaml"), "x")
    assert len(example.one_caption_each()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML: .* line 1"),
        ("[a, b]", "is neither"),
        ("no: [x]", "the class name False is not a text"),
        ("a: b", "prompts of a are not a list of texts"),
        ("classnames: a", "its class names are not a list of texts"),
    ],
)
def test_a_yaml_that_says_something_else_is_an_error(tmp_path, text, message):
    (tmp_path / "prompts.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_class_names(str(tmp_path / "prompts.yaml"), "x")
