"""Whole runs on labelled sets: zero-shot evaluation, FLYP, linear probe, learned prompts."""

import json
from importlib.resources import files
from pathlib import Path

import pytest

from clip_train.checkpoints.folder import read_weights
from clip_train.training.loggers.csv_logger import read_metrics
from tests.cli.runs import TINY, clip_train, train_tiny
from tests.cli.test_evaluate import unpacked
from tests.labelled import CLASSES, make_labelled

SET = ["data.val.shards=null", "data.num_workers=1", "batch_size=28", "optim.warmup=0 steps", "eval.batch_size=16"]


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> str:
    """70 pictures of seven colours."""
    return make_labelled(tmp_path_factory.mktemp("labelled") / "colours", [30, 40])


@pytest.fixture(scope="module")
def val(tmp_path_factory) -> str:
    return make_labelled(tmp_path_factory.mktemp("labelled") / "colours_val", [25], first=70)


@pytest.fixture(scope="module")
def base(tmp_path_factory, pattern, val) -> Path:
    """A run on captions of the classes, of which the last row says how well it does."""
    folder = tmp_path_factory.mktemp("base")
    train_tiny(
        *(folder, "base", f"data.train.shards={pattern}", *SET, "finetune=flyp", "optim.lr=1e-3", "max_steps=4"),
        *(f"eval.zero_shot={val}", "eval.every=2 steps", "checkpoint.best_metric=zero_shot/colours_val/top1"),
    )
    return folder / "base"


def checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("samples_*.ckpt"))[-1]


def scores(run: Path) -> list[tuple[float, float]]:
    """Top-1 and top-5 of every evaluation."""
    _, rows = read_metrics(run / "metrics.csv")
    names = ("zero_shot/colours_val/top1", "zero_shot/colours_val/top5")
    return [tuple(float(row[name]) for name in names) for row in rows if row[names[0]]]  # pyright: ignore[reportReturnType]


def test_zero_shot_accuracy_is_logged_and_chooses_checkpoints(base):
    found = scores(base)
    assert len(found) == 2 and all(0 <= top1 <= top5 <= 1 for top1, top5 in found)
    summary = json.loads((base / "summary.json").read_text())["metrics"]
    assert (summary["zero_shot/colours_val/top1"], summary["zero_shot/colours_val/top5"]) == found[-1]
    assert "colours_val: top-1" in (base / "train.log").read_text()
    assert (base / "confusion_colours_val.png").read_bytes().startswith(b"\x89PNG")


def test_a_set_to_measure_on_may_be_class_folders_under_known_names(tmp_path, pattern, val):
    folder = unpacked(val, tmp_path / "folders")
    names, templates = (
        json.loads((files("clip_benchmark") / "datasets" / f"en_{what}.json").read_text())["fer2013"]
        for what in ("classnames", "zeroshot_classification_templates")
    )
    (tmp_path / "fer.json").write_text(json.dumps({"classnames": names, "templates": templates}))
    sets = (
        f"shards: {{shards: {val}}}, folders: {{shards: {folder}}}",
        f"known: {{shards: {val}, classnames: fer2013}}, named: {{shards: {val}, classes: {tmp_path}/fer.json}}",
    )
    run = (f"data.train.shards={pattern}", *SET, "optim.lr=1e-3", "max_steps=3", "eval.picture=false")
    train_tiny(tmp_path, "run", *run, f"eval.zero_shot={{{', '.join(sets)}}}", ranks=2)
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    shards, folders, known, named = (
        [metrics[f"zero_shot/{name}/{metric}"] for metric in ("top1", "top5", "mean_per_class_recall")]
        for name in ("shards", "folders", "known", "named")
    )
    assert shards == pytest.approx(folders) and known == pytest.approx(named)
    assert shards != known


def probe_arguments(pattern: str, val: str, base: Path) -> list[str]:
    data = [f"data.train.shards={pattern}", *SET, f"init_from={checkpoint(base)}"]
    return [*data, "optim.lr=0.01", f"eval.zero_shot={{colours_val: {{shards: {val}, classes: null}}}}"]


def test_a_linear_probe_learns_from_features_computed_once(tmp_path, pattern, val, base):
    arguments = [*probe_arguments(pattern, val, base), "finetune=linear_probe", f"data.cache_dir={tmp_path}/cache"]
    rows = train_tiny(tmp_path, "one", *arguments, "max_steps=20", "eval.every=10 steps")
    losses = [float(row["train/loss"]) for row in rows]
    assert losses[-1] < losses[0] and 0 <= float(rows[-1]["train/top1"]) <= 1
    assert len(scores(tmp_path / "one")) == 2
    (features,) = (tmp_path / "cache").glob("features_*")
    saved = read_weights(checkpoint(tmp_path / "one"))
    assert set(saved) == {"model.head.weight", "model.head.bias"}
    assert len(saved["model.head.weight"]) == len(CLASSES)

    before = {path: path.stat().st_mtime_ns for path in features.iterdir()}
    two = train_tiny(tmp_path, "two", *arguments, "max_steps=20", "micro_batch_size=5", ranks=2)
    assert {path: path.stat().st_mtime_ns for path in features.iterdir()} == before
    assert [float(row["train/loss"]) for row in two] == pytest.approx(losses, abs=1e-5)
    assert scores(tmp_path / "two")[-1] == scores(tmp_path / "one")[-1]


def test_a_linear_probe_begins_as_the_zero_shot_classifier_and_resumes(tmp_path, pattern, val, base):
    arguments = [*probe_arguments(pattern, val, base), "finetune=linear_probe", "checkpoint.every=2 steps"]
    still = [*arguments, "optim.lr=0", "max_steps=2"]
    train_tiny(tmp_path, "still", *still)
    assert scores(tmp_path / "still")[-1] == scores(base)[-1]
    assert list((tmp_path / "still").glob("features_*"))
    whole = train_tiny(tmp_path, "whole", *arguments, "max_steps=4", "schedule=constant")
    train_tiny(tmp_path, "half", *arguments, "max_steps=2", "schedule=constant")
    rest = train_tiny(tmp_path, "half", *arguments, "max_steps=4", "schedule=constant", "resume=auto")
    assert [row["train/loss"] for row in rest] == [row["train/loss"] for row in whole]


@pytest.mark.parametrize("method", ["prompt", "cocoop"])
def test_prompts_are_learned_alike_on_any_number_of_ranks(tmp_path, pattern, val, base, method):
    chosen = {"prompt": ["finetune=prompt", "finetune.n_ctx=4", "finetune.csc=true"], "cocoop": ["finetune=cocoop"]}
    arguments = [*probe_arguments(pattern, val, base), *chosen[method], "max_steps=5"]
    one = train_tiny(tmp_path, "one", *arguments, "micro_batch_size=7")
    two = train_tiny(tmp_path, "two", *arguments, ranks=2)
    losses = [float(row["train/loss"]) for row in one]
    assert [float(row["train/loss"]) for row in two] == pytest.approx(losses, abs=1e-5)
    assert [float(row["train/top1"]) for row in two] == pytest.approx([float(row["train/top1"]) for row in one])
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
    saved = {name.removeprefix("model.") for name in read_weights(checkpoint(tmp_path / "one"))}
    meta_net = {f"meta_net.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")}
    assert saved == {"context"} | (meta_net if method == "cocoop" else set())


def refused(tmp_path: Path, *arguments: str) -> str:
    done = clip_train(*TINY, f"output_dir={tmp_path}/runs", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "runs").exists()
    return done.stderr


def test_what_cannot_be_is_refused_in_one_line(tmp_path, pattern, val, base):
    arguments = probe_arguments(pattern, val, base)
    probe = [*arguments, "finetune=linear_probe", "max_steps=2"]
    assert "finetune learns from labels: give data.caption_key=cls" in refused(tmp_path, *probe, "data.caption_key=txt")
    without_eval = [argument for argument in probe if not argument.startswith("eval.zero_shot")]
    other = make_labelled(tmp_path / "two", [4], num_classes=2)
    line = refused(tmp_path, *without_eval, f"eval.zero_shot={{two: {other}}}")
    assert "eval.zero_shot.two has other classes than the training set" in line
    Path(tmp_path / "two" / "classes.json").unlink()
    line = refused(tmp_path, *without_eval, f"eval.zero_shot={{two: {other}}}")
    assert "give eval.zero_shot.two.classes" in line
    line = refused(tmp_path, *without_eval, f"eval.zero_shot={{two: {{shards: {other}, classnames: two}}}}")
    assert "eval.zero_shot.two.classnames=two: clip-benchmark has those of" in line
    assert "give init_from=WEIGHTS" in refused(tmp_path, *probe, "init_from=null")
    assert "micro_batch_size=auto does not try" in refused(tmp_path, *probe, "micro_batch_size=auto")
    best = "checkpoint.best_metric=val/colours/loss"
    assert "there are zero_shot/colours_val/top1, zero_shot/colours_val/top5" in refused(tmp_path, *probe, best)
