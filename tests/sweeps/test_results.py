import csv

import pytest
from hydra import compose, initialize_config_dir

from clip_train.commands.program import config_dir
from clip_train.sweeps.objective import Objective
from clip_train.sweeps.results import write_best, write_results
from clip_train.sweeps.trial import COMPLETE, FAILED, Trial

GROUPS = ["data", "eval", "experiment", "logger", "loss", "model", "optim", "sweep", "trainer"]
FIXED = [
    "experiment=demo",
    "model=vit_b_32,vit_b_16",
    "logger=[csv,wandb]",
    "loss=sigmoid",
    "sweep=lr_wd",
    "+data.extra={a: 1}",
    "data.train.shards='x/{00..01}.tar'",
    "max_steps=7",
    "output_dir=elsewhere",
    "run_name=sweep",
    "optim.grad_clip=null",
]
OBJECTIVE = Objective(("val/x/loss",), "minimize")


def test_results_have_a_row_for_each_trial(tmp_path):
    run = tmp_path / "run_0"
    run.mkdir()
    (run / "metrics.csv").write_text("step,samples_seen,train/loss\n1,32,3.0\n2,64,2.5\n")
    trials = [
        Trial(1, ("optim.lr=0.1", "model=a"), tmp_path / "run_1", FAILED),
        Trial(0, ("optim.lr=0.01", "model=b"), run, COMPLETE, 0.25),
    ]
    write_results(tmp_path / "results.csv", trials)
    with open(tmp_path / "results.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "number": "0",
        "state": "complete",
        "metric": "0.25",
        "samples_seen": "64",
        "overrides": "optim.lr=0.01 model=b",
        "run_folder": str(run),
        "optim.lr": "0.01",
        "model": "b",
    }
    assert (second["state"], second["metric"], second["samples_seen"]) == ("failed", "", "")


def test_best_is_an_experiment_that_composes_to_the_trials_config(tmp_path):
    fixed = [override for override in FIXED if not override.startswith("model=")]
    trial = Trial(3, ("model=vit_b_16", "optim.lr=0.001"), tmp_path / "run_3", COMPLETE, 0.5)
    write_best(tmp_path, trial, fixed, GROUPS, OBJECTIVE)
    with initialize_config_dir(config_dir(), version_base="1.3"):
        expected = compose("train", [*fixed, *trial.overrides, "max_epochs=null", "run_name=null", "output_dir=runs"])
        search_path = f"hydra.searchpath=[file://{tmp_path}]"
        found = compose("train", ["experiment=best", search_path])
    assert found == expected
    assert found.model.vision.name == "vit_base_patch16_clip_224"
    assert list(found.logger) == ["csv", "wandb"]


def test_a_key_that_is_removed_is_said(tmp_path):
    write_best(tmp_path, Trial(0, (), tmp_path, COMPLETE, 0.5), ["~optim.eps"], GROUPS, OBJECTIVE)
    assert (
        "# Add to the command line, as a file cannot remove a key: ~optim.eps"
        in (tmp_path / "experiment" / "best.yaml").read_text()
    )


@pytest.mark.parametrize("overrides", [(), ("optim.lr=1",)])
def test_no_value_no_best(tmp_path, overrides):
    from clip_train.sweeps.results import best_trial

    assert best_trial([Trial(0, overrides, tmp_path, FAILED)], OBJECTIVE) is None
