"""clip-benchmark, run on weights that we have exported, finds what we find."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark import cli
from clip_benchmark.metrics import zeroshot_classification
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import save_file

from clip_train.commands.program import config_dir
from clip_train.evaluation.labelled_set import LabelledSet, open_labelled_set
from clip_train.evaluation.loaded_model import LoadedModel, load_model
from clip_train.evaluation.results import write_results
from clip_train.evaluation.tasks import TASKS
from clip_train.evaluation.zero_shot_task import make_zero_shot_classifier
from clip_train.interop.exporting import export
from clip_train.interop.model_source import open_model
from clip_train.typed_config import typed
from tests.conftest import encode_image, write_shard
from tests.interop.tiny import CLIP, ours

NAMES = ("apple", "red pear", "plum", "quince", "medlar", "grape", "fig")
SIZES = ((32, 32), (50, 40), (37, 61), (20, 16))


def write_set(folder: Path) -> Path:
    """45 pictures of several sizes in two shards, as clip-benchmark exports sets."""
    (folder / "test").mkdir(parents=True)
    for shard, numbers in enumerate((range(20), range(20, 45))):
        samples = [
            {"__key__": f"s{n:06d}", "png": encode_image(n, SIZES[n % len(SIZES)]), "cls": str(n * n % len(NAMES))}
            for n in numbers
        ]
        write_shard(folder / "test" / f"{shard}.tar", samples)
    (folder / "test" / "nshards.txt").write_text("2")
    (folder / "classnames.txt").write_text("\n".join(NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}\n")
    return folder


def clip_benchmark(monkeypatch, *arguments: str) -> None:
    """Its program, in this process."""
    monkeypatch.setattr("sys.argv", ["clip_benchmark", *arguments])
    # It takes float() of arrays of one number, which numpy does no more.
    monkeypatch.setattr(zeroshot_classification, "float", _to_float, raising=False)
    cli.main()


def _to_float(value: Any) -> float:
    return float(np.asarray(value, dtype=np.float64).item())


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return compose("eval", [*overrides, "data.num_workers=0"])


@pytest.fixture
def loaded(tmp_path) -> LoadedModel:
    save_file(ours(CLIP).state_dict(), tmp_path / "clip.safetensors")
    source = open_model(str(tmp_path / "clip.safetensors"), CLIP)
    return load_model(source, torch.device("cpu"), precision="32", compile=False, batch_size=7, num_workers=0)


def test_zero_shot(tmp_path, monkeypatch, loaded):
    folder = write_set(tmp_path / "wds_fruit")
    export(str(tmp_path / "clip.safetensors"), tmp_path / "open_clip", "open_clip", CLIP)
    logits = []
    classify = zeroshot_classification.run_classification

    def noted(*args, **kwargs):
        logits.append(classify(*args, **kwargs))
        return logits[0]

    monkeypatch.setattr(zeroshot_classification, "run_classification", noted)
    clip_benchmark(
        *(monkeypatch, "eval", "--no_amp", "--num_workers=0", "--batch_size=16", f"--output={tmp_path}/theirs.json"),
        *(f"--model=local-dir:{tmp_path}/open_clip", "--pretrained=", "--task=zeroshot_classification"),
        *("--dataset=wds/fruit", f"--dataset_root={folder}"),
    )
    theirs = json.loads((tmp_path / "theirs.json").read_text())

    cfg = config(f"data.path={folder}", f"output={tmp_path}", "task.dataset=wds/fruit")
    results = TASKS["zero_shot"](loaded, cfg)
    assert 0 < theirs["metrics"]["acc1"] < theirs["metrics"]["acc5"] < 1
    assert {name: results.metrics[name] for name in theirs["metrics"]} == pytest.approx(theirs["metrics"], abs=1e-4)

    _, batches = open_labelled_set(typed(LabelledSet, cfg.task), loaded, cfg)
    scores, _ = make_zero_shot_classifier(loaded, batches, "embedding")
    batch: Any = batches[range(len(batches))]
    with torch.no_grad():
        cosines = scores(batch["image"])
    assert torch.equal(batch["label"], logits[0][1])
    assert len(cosines.argmax(1).unique()) > 1
    assert (cosines - logits[0][0] / 100).abs().max() < 1e-5

    write_results(results, tmp_path, "tiny", "random")
    mine = json.loads((tmp_path / "results.json").read_text())
    assert mine.keys() == theirs.keys()
    assert (mine["dataset"], mine["task"], mine["language"]) == tuple(
        theirs[key] for key in ("dataset", "task", "language")
    )
    clip_benchmark(
        monkeypatch, "build", f"{tmp_path}/results.json", f"{tmp_path}/theirs.json", f"--output={tmp_path}/a.csv"
    )
    rows = read_csv(tmp_path / "a.csv")
    assert [float(row["acc1"]) for row in rows] == pytest.approx([theirs["metrics"]["acc1"]] * 2, abs=1e-4)
    (row,) = read_csv(tmp_path / "results.csv")
    assert row == rows[0]


def write_captioned(folder: Path) -> Path:
    """23 pictures with one to four captions each, a line each, as clip-benchmark exports sets."""
    (folder / "test").mkdir(parents=True)
    samples = [
        {
            "__key__": f"s{n:06d}",
            "png": encode_image(n, SIZES[n % len(SIZES)]),
            "txt": "\n".join(f"{NAMES[n % 7]} number {n} seen {view} times" for view in range(1 + n % 4)),
        }
        for n in range(23)
    ]
    write_shard(folder / "test" / "0.tar", samples)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("retrieval")
    return folder


def test_retrieval(tmp_path, monkeypatch, loaded):
    folder = write_captioned(tmp_path / "wds_fruit")
    export(str(tmp_path / "clip.safetensors"), tmp_path / "open_clip", "open_clip", CLIP)
    clip_benchmark(
        *(monkeypatch, "eval", "--no_amp", "--num_workers=0", "--batch_size=16", f"--output={tmp_path}/theirs.json"),
        *(f"--model=local-dir:{tmp_path}/open_clip", "--pretrained=", "--task=zeroshot_retrieval"),
        *("--dataset=wds/fruit", f"--dataset_root={folder}", "--recall_k", "1", "5", "10"),
    )
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    results = TASKS["retrieval"](loaded, config("task=retrieval", f"data.path={folder}", f"output={tmp_path}"))
    assert 0 < theirs["metrics"]["image_retrieval_recall@5"] < theirs["metrics"]["image_retrieval_recall@10"] < 1
    assert len(theirs["metrics"]) == 6
    assert {name: results.metrics[name] for name in theirs["metrics"]} == pytest.approx(theirs["metrics"], abs=1e-4)
    assert results.task == theirs["task"]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
