"""clip-plan on the command line: all that clip-train takes, and figures that agree with each other."""

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from clip_train.commands import plan
from clip_train.models.checkpointing import BLOCKS, NONE
from clip_train.planning.plan import _can
from tests.cli.embeddings import call
from tests.cli.runs import TINY

clip_plan = partial(call, plan.main)
RUN = [*TINY, "max_steps=1000"]


def planned(tmp_path, *arguments: str) -> dict:
    """What is written as JSON."""
    return both(tmp_path, *arguments)[0]


def both(tmp_path, *arguments: str) -> tuple[dict, str]:
    """What is written as JSON, and what is printed."""
    output = tmp_path / "plan.json"
    code, out, error = clip_plan(*RUN, f"plan.output={output}", *arguments)
    assert code == 0, error
    return json.loads(output.read_text()), out


def test_the_figures_agree_with_each_other(tmp_path):
    two_nodes = ["batch_size=2048", "trainer.devices=4", "trainer.num_nodes=2"]
    found, out = both(tmp_path, *two_nodes, "plan.price_per_hour=3")
    assert "│ cost " in out
    chosen = found["chosen"]
    step = sum(chosen["step"][part] for part in ("towers", "loss", "loss_exchange", "gradient_exchange"))
    assert chosen["pairs_per_second"] == pytest.approx(2048 / step)
    assert chosen["gpu_hours"] == pytest.approx(1000 * step / 3600 * 8)
    assert chosen["cost"] == pytest.approx(3 * chosen["gpu_hours"])
    assert chosen["days"] == pytest.approx(chosen["gpu_hours"] / 8 / 24)
    parameters = 4 * sum(found["parameters"].values())
    assert chosen["memory"]["gradients"] == parameters
    assert chosen["memory"]["optimizer"] == 2 * parameters
    assert chosen["traffic"]["gradients"] == 2 * 7 / 8 * parameters
    assert (found["typical_tokens"], found["context_length"]) == (16, 16)
    assert {way["job"]["strategy"] for way in found["alternatives"]} == {"ddp", "fsdp"}
    assert {way["checkpointing"] for way in found["alternatives"]} == {"none", "blocks", "selective"}
    vision = {mode: saved["vision"] for mode, saved in found["activations"].items()}
    assert vision["blocks"] < vision["selective"] < vision["none"]
    assert {way["job"]["devices"] * way["job"]["num_nodes"] for way in found["alternatives"]} == {4, 8, 16}
    assert [int(gpus) for gpus in found["scaling"]] == [2**power for power in range(11)]
    same = found["scaling"]["8"]
    assert same["step"] == chosen["step"] and same["memory"] == chosen["memory"]


def test_what_does_not_fit_is_told_what_would(tmp_path):
    arguments = ["batch_size=65536", "trainer.devices=1", "plan.hardware=rtx4090", "plan.usable_memory=0.1"]
    code, out, _ = clip_plan(*RUN, *arguments)
    assert code == 0 and "DOES NOT FIT" in out
    largest = int(out.partition("micro_batch_size=")[2].split()[0])
    found = planned(tmp_path, *arguments, "micro_batch_size=auto")
    assert found["chosen"]["fits"]
    assert found["largest"] == found["chosen"]["job"]["micro_batch_size"] == largest
    assert not planned(tmp_path, *arguments, f"micro_batch_size={2 * largest}")["chosen"]["fits"]


def test_a_gpu_that_outruns_its_loader_is_named():
    tiny = [*RUN, "batch_size=4096", "trainer.devices=1"]
    _, out, _ = clip_plan(*tiny, "data.num_workers=2")
    assert "the loader will be the limit" in out and "data.num_workers=2 is 2 processes per GPU" in out
    _, out, _ = clip_plan(*tiny, "plan.images_per_core=1e9")
    assert "the loader will be the limit" not in out
    assert "│ cost " not in out  # without a price


@pytest.mark.parametrize(
    "arguments",
    [
        ["loss=sigmoid", "loss.exchange=gather", "optim=lion", "ema.decay=0.999", "trainer.strategy=fsdp"],
        ["optim=muon", "trainer.precision=bf16-true", "model.grad_checkpointing=selective", "resume=auto"],
        ["finetune=lora", "init_from=any", "optim=lamb", "max_samples=12.8B", "max_steps=null"],
        ["experiment=demo", "max_epochs=2", "max_steps=null", "plan.epoch_samples=3k", "optim=sgd"],
    ],
    ids=["sigmoid", "muon", "lora", "demo"],
)
def test_takes_what_clip_train_takes(arguments):
    code, out, error = clip_plan(*RUN, "trainer.devices=2", *arguments)
    assert code == 0, error
    assert "fits" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["max_steps=null"], "max_epochs=32 says no length without the number of training pairs"),
        (["max_steps=null", "max_epochs=null"], "give exactly one of max_samples, max_steps, max_epochs"),
        (["max_samples=10k"], "max_samples and max_steps are both given"),
        (["model.grad_checkpointing=all"], "model.grad_checkpointing=all is none of none, blocks, selective"),
        (["plan.hardware=h1000"], "plan.hardware=h1000 is unknown; did you mean h100?"),
        (["plan.efficiency=40"], "plan.efficiency=40 is a share"),
        (["plan.efficiency=half"], "plan.efficiency"),
        (["plan.eficiency=0.4"], "did you mean plan.efficiency"),
        (["trainer.devices=5"], "batch_size=32 does not divide over 5 processes"),
        (["finetune=linear_probe", "init_from=any"], "finetune=linear_probe needs the data's classes"),
        (["plan.output=/none/plan.json"], "plan.output=/none/plan.json cannot be written"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    code, _, error = clip_plan(*RUN, *arguments)
    assert code == 2
    assert message in error and error.count("\n") == 1


def test_what_is_measured_here_can_be_planned_with(tmp_path):
    output = tmp_path / "here.json"
    code, out, error = clip_plan("calibrate", f"output={output}", "seconds=0.05")
    assert code == 0, error
    assert f"plan.hardware={output}" in out
    found = planned(tmp_path, f"plan.hardware={output}", "trainer.devices=1")
    assert found["hardware"] == json.loads(output.read_text())


def test_a_mode_that_no_one_asked_for_may_fail_in_any_way():
    def fail(mode: str) -> None:
        raise RuntimeError(f"{mode}: what some library says")

    planner: Any = SimpleNamespace(activations=fail)
    assert not _can(planner, BLOCKS, wanted=NONE)
    with pytest.raises(RuntimeError, match="blocks: what"):
        _can(planner, BLOCKS, wanted=BLOCKS)
