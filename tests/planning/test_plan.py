"""clip-plan on the command line: all that clip-train takes, and figures that agree with each other."""

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from torch._inductor.exc import InvalidCxxCompiler

from clip_train.commands import plan
from clip_train.models.activation_checkpointing import BLOCKS, NONE
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
    assert "│ cost " in out and "…" not in out  # what is no terminal is wide enough for all figures
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
    for gpus, way in found["scaling"].items():
        ranks = int(gpus)
        assert way["traffic"]["gradients"] == pytest.approx(2 * (ranks - 1) / ranks * parameters)
        assert way["memory"]["batch"] == 2 * 2048 / ranks * (3 * 32 * 32 + 8 * 16)
        assert way["cost"] == pytest.approx(3 * way["gpu_hours"])
    scaling = out.partition("on other numbers of GPUs")[2].splitlines()
    assert "│ cost │" in scaling[2].replace("┃", "│")


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


def no_compiler() -> str:
    raise InvalidCxxCompiler


@pytest.mark.parametrize(
    "arguments",
    [
        ["loss=sigmoid", "loss.exchange=gather", "optim=lion", "ema.decay=0.999", "trainer.strategy=fsdp"],
        ["optim=muon", "trainer.precision=bf16-true", "model.grad_checkpointing=selective", "resume=auto"],
        ["finetune=lora", "init_from=any", "optim=lamb", "max_samples=12.8B", "max_steps=null"],
        ["experiment=demo", "max_epochs=2", "max_steps=null", "plan.epoch_samples=3k", "optim=sgd"],
        ["trainer.accelerator=gpu", "trainer.compile=reduce-overhead", "optim.state=8bit"],
    ],
    ids=["sigmoid", "muon", "lora", "demo", "graphs"],
)
def test_takes_what_clip_train_takes(arguments, monkeypatch):
    """Which may be no more than planned here, where nothing can be compiled."""
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
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
        (["trainer.compile=reduce-overhead"], "makes CUDA graphs, which need a GPU"),
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
    arguments = ["trainer.devices=1", "batch_size=16384", "model.embed_dim=512"]
    found = planned(tmp_path, f"plan.hardware={output}", *arguments)
    assert found["hardware"] == json.loads(output.read_text())
    # A processor's tiles are small: docs/large_batch.md has what was measured.
    assert found["chosen"]["memory"]["loss"] == pytest.approx(89e6, rel=0.25)


def test_float8_and_offloading_change_the_time_and_say_so(tmp_path):
    gpu = ["trainer.accelerator=gpu", "trainer.devices=2", "trainer.precision=bf16-mixed", "batch_size=4096"]
    both_on = ["trainer.float8=true", "trainer.strategy=fsdp", "trainer.fsdp.cpu_offload=true"]
    found, out = both(tmp_path, *gpu, *both_on)
    step = found["chosen"]["step"]
    in_bf16 = (step["flops"] - step["loss"] * 67e12 * 0.3) / (989e12 * 0.3)
    assert in_bf16 / 2 < step["towers"] < 0.9 * in_bf16
    assert step["host"] > 0
    assert "1,979.0 TFLOP/s in float8" in out and "64 GB/s to the host" in out and "shards from the host" in out
    _, out = both(tmp_path, *gpu, "trainer.float8=true", "plan.hardware=a100")
    assert "NOTE: trainer.float8: A100 SXM 80 GB has no rate in float8" in out and "TFLOP/s in float8" not in out


def test_a_mode_that_no_one_asked_for_may_fail_in_any_way():
    def fail(mode: str) -> None:
        raise RuntimeError(f"{mode}: what some library says")

    planner: Any = SimpleNamespace(activations=fail)
    assert not _can(planner, BLOCKS, wanted=NONE)
    with pytest.raises(RuntimeError, match="blocks: what"):
        _can(planner, BLOCKS, wanted=BLOCKS)
