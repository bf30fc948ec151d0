"""clip-eval, by the command line."""

import csv
import io
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

from clip_train.commands.program import config_dir
from tests.cli.runs import TINY
from tests.cli.warm_start import run_module
from tests.interop.tiny import ours
from tests.labelled import CLASSES, make_labelled

MODEL = [override for override in TINY if override.startswith("model")]


def clip_eval(*arguments: str, **env: str):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return run_module("clip_train.commands.evaluate", [*arguments, "trainer.accelerator=cpu"], env, 600)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[str]:
    """Arguments that name random weights."""
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", MODEL).model, resolve=True)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(ours(config).state_dict(), path)  # pyright: ignore[reportArgumentType]
    return [f"weights={path}", *MODEL]


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> str:
    """33 pictures of seven colours."""
    return make_labelled(tmp_path_factory.mktemp("labelled") / "colours", [20, 13])


def evaluated(output: Path, *arguments: str) -> dict[str, bytes]:
    """The files of an evaluation."""
    done = clip_eval(*arguments, f"output={output}", "batch_size=8", "data.num_workers=0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "acc1" in done.stdout and f"wrote {output}/results.json" in done.stdout
    return {path.name: path.read_bytes() for path in output.iterdir()}


def unpacked(pattern: str, folder: Path) -> Path:
    """The same pictures in class folders."""
    for shard in sorted(Path(pattern).parent.glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore
        for name, content in files.items():
            if name.endswith(".png"):
                label = int(files[name.replace(".png", ".cls")])
                (folder / CLASSES[label]).mkdir(parents=True, exist_ok=True)
                (folder / CLASSES[label] / name).write_bytes(content)
    (folder / "classes.json").write_bytes((Path(pattern).parent / "classes.json").read_bytes())
    return folder


def test_zero_shot_on_one_rank_and_two_on_shards_and_folders(tmp_path, weights, pattern):
    one = evaluated(tmp_path / "one", *weights, f"data={pattern}")
    found = json.loads(one["results.json"])
    assert (found["dataset"], found["model"], found["task"]) == ("colours", "vit_tiny", "zeroshot_classification")
    assert 0 < found["metrics"]["acc1"] < found["metrics"]["acc5"] < 1
    confusion = list(csv.reader(io.StringIO(one["confusion_matrix.csv"].decode())))
    counts = [[int(count) for count in row[1:]] for row in confusion[1:]]
    assert sum(map(sum, counts)) == 33
    assert sum(counts[n][n] for n in range(7)) / 33 == pytest.approx(found["metrics"]["acc1"])
    rows = json.loads(one["per_class.json"])
    assert [row["recall"] for row in rows] == [counts[n][n] / sum(counts[n]) for n in range(7)]
    assert one.keys() >= {"confusion_matrix.png", "calibration.png", "results.csv"}

    two = evaluated(tmp_path / "two", *weights, f"data={pattern}", "trainer.devices=2")
    assert two["confusion_matrix.csv"] == one["confusion_matrix.csv"]
    assert json.loads(two["results.json"])["metrics"] == pytest.approx(found["metrics"], abs=1e-6)

    folder = unpacked(pattern, tmp_path / "folders")
    three = evaluated(tmp_path / "three", *weights, f"data={folder}")
    assert json.loads(three["results.json"])["metrics"] == pytest.approx(found["metrics"], abs=1e-6)


def test_robustness_has_a_row_for_each_corruption(tmp_path, weights, pattern):
    """With prompts of one's own, averaged as probabilities, in bf16."""
    (tmp_path / "prompts.yaml").write_text("".join(f"{name}: [{name}, 'all {name}']\n" for name in CLASSES))
    options = ["task=robustness", "task.resize=[0.25]", "task.dataset=mine", "precision=bf16"]
    prompts = [f"task.classes={tmp_path}/prompts.yaml", "task.ensemble=probability"]
    files = evaluated(tmp_path / "out", *weights, f"data={pattern}", *options, *prompts)
    rows = list(csv.DictReader(io.StringIO(files["results.csv"].decode())))
    assert [row["variant"] for row in rows][:3] == ["", "resize=0.25", "jpeg_quality=50"]
    accuracies = [float(row["acc1"]) for row in rows]
    assert all(0 < float(row["ece"]) < 1 for row in rows)
    results = json.loads(files["results.json"])
    assert results["dataset"] == "mine"
    assert results["metrics"]["mean_corrupted_acc1"] == pytest.approx(sum(accuracies[1:]) / len(accuracies[1:]))


def test_what_cannot_be_is_one_line(tmp_path, weights, pattern):
    data = f"data={pattern}"
    for arguments, message in (
        (weights, "data has no value: give data=..."),
        ([*weights, data, "output=/proc/out"], "output=/proc/out cannot be written"),
        ([*weights, data, "task=zeroshot"], "task=zeroshot: no such config; did you mean zero_shot"),
        ([*weights, data, "precision=16"], "precision=16 is none of 32, bf16"),
        ([*weights, data, "task.ensemble=logits"], "task.ensemble=logits is none of embedding, probability"),
        ([*weights, data, "task.classnames=cifar10"], "task.classnames=cifar10: clip-benchmark has those of"),
        ([*weights, data, "task.classes=a.txt", "task.templates=mnist"], "task.classes and task.templates are both"),
        ([f"report={tmp_path}"], f"report={tmp_path} is not the folder of a run: it has no config.yaml"),
        ([*weights, f"data={tmp_path}"], f"data: {tmp_path} has neither shards"),
        ([*weights, f"data={tmp_path}/x"], f"data: shard {tmp_path}/x does not exist"),
    ):
        done = clip_eval(f"output={tmp_path}/out", *arguments)
        assert done.returncode == 2, done.stderr
        assert re.fullmatch(rf"clip-eval: error: {re.escape(message)}.*\n", done.stderr), done.stderr


def test_what_only_one_process_lacks_ends_both_in_one_line(tmp_path, weights, pattern):
    (tmp_path / "rank0").symlink_to(Path(pattern).parent)
    arguments = [*weights, f"data='{tmp_path}/rank${{oc.env:RANK}}/*.tar'", f"output={tmp_path}/out"]
    settings = ["trainer.accelerator=cpu", "data.num_workers=0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_module("clip_train.commands.evaluate", [*arguments, *settings], env, 600, ranks=2)
    assert done.returncode == 2
    assert done.stderr.startswith(f"clip-eval: error: data: no file matches {tmp_path}/rank1/*.tar")
    assert done.stderr.count("\n") == 1


def test_the_report_of_a_run_is_written_again(tmp_path):
    (tmp_path / "config.yaml").write_text("batch_size: 64\n")
    done = clip_eval(f"report={tmp_path}")
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path}/report.html\n", done.stderr
    assert "batch_size: 64" in (tmp_path / "report.html").read_text()
