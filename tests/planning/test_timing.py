"""Times by hand, and what they must do when something changes."""

import json
from dataclasses import replace

import pytest
import torch

from clip_train.errors import ConfigError
from clip_train.planning.hardware import TABLE, Hardware, find_hardware, measure_hardware, write_hardware
from clip_train.planning.job import Job
from clip_train.planning.states import beside_towers, sharded_units
from clip_train.planning.timing import Assumptions, time_step
from clip_train.planning.towers import Flops, PlannedModel
from clip_train.planning.traffic import Traffic, plan_traffic
from tests.planning import steps

DEVICE = Hardware("one", memory=1e9, bf16=1e12, fp32=1e11, link=1e10, network=1e9)
ASSUMED = Assumptions(efficiency=0.5, link_efficiency=0.5, overlap=0.5)
FLOPS = Flops({"vision": 1e9, "text": 1e9}, training=6e9)
ALONE = Job(1000, 1, 1, None, "ddp", "contrastive", "gather", 4, 100)
SILENT = Traffic(0.0, 0.0, 0.0, 0.0, 0.0)
BOTH = ("vision", "text")


def test_of_one_process_it_is_the_products_over_the_rate():
    step = time_step(ALONE, FLOPS, BOTH, SILENT, DEVICE, "bf16-mixed", ASSUMED)
    assert step.towers == pytest.approx(1000 * 6e9 / 0.5e12)
    assert step.loss == pytest.approx(8 * 1000 * 1000 * 100 / 0.5e11)
    assert step.total == step.towers + step.loss
    assert time_step(ALONE, FLOPS, BOTH, SILENT, DEVICE, "32", ASSUMED).towers == pytest.approx(10 * step.towers)


def test_of_four_micro_batches_three_go_forward_twice_but_for_a_frozen_tower():
    plain = time_step(ALONE, FLOPS, BOTH, SILENT, DEVICE, "32", ASSUMED)
    cached = replace(ALONE, micro_batch_size=250)
    ratio = time_step(cached, FLOPS, BOTH, SILENT, DEVICE, "32", ASSUMED).towers / plain.towers
    assert ratio == pytest.approx(1.25)
    ratio = time_step(cached, FLOPS, ("text",), SILENT, DEVICE, "32", ASSUMED).towers / plain.towers
    assert ratio == pytest.approx(1.125)


def test_gradients_hide_behind_half_of_backward():
    job = replace(ALONE, batch_size=8000, devices=8)
    small, large = (
        time_step(job, FLOPS, BOTH, replace(SILENT, gradients=size), DEVICE, "bf16-mixed", ASSUMED)
        for size in (1e9, 40e9)
    )
    assert small.gradient_exchange == 0
    assert large.gradient_exchange == pytest.approx(40e9 / 0.5e10 - 0.5 * 2 / 3 * large.towers)
    between = time_step(
        replace(job, devices=4, num_nodes=2), FLOPS, BOTH, replace(SILENT, features=1e9), DEVICE, "32", ASSUMED
    )
    assert between.loss_exchange == pytest.approx(1e9 / 0.5e9, rel=0.01)


def test_float8_is_a_rate_of_its_own_for_its_layers_in_what_learns():
    flops = Flops({"vision": 1e9, "text": 1e9}, training=4e9, float8=0.5e9)  # vision is locked
    fast = replace(DEVICE, float8=2e12)
    step = time_step(ALONE, flops, ("text",), SILENT, fast, "bf16-mixed", ASSUMED)
    assert step.towers == pytest.approx(1000 * (2.5e9 / 0.5e12 + 1.5e9 / 1e12))  # half of text's 3e9
    plain = time_step(ALONE, flops, ("text",), SILENT, DEVICE, "bf16-mixed", ASSUMED)
    assert plain.towers == pytest.approx(1000 * 4e9 / 0.5e12)
    assert plain.flops == step.flops


def test_shards_come_from_the_host_for_each_gathering_and_gradients_go_there_once():
    model = PlannedModel(steps.VIT).model
    job = Job(16, 1, 1, None, "fsdp", "contrastive", "gather", 4, 64, offload=True)
    traffic = plan_traffic(job, 0.0, sharded_units(model, "bf16-mixed"), beside_towers(model))
    every = sum(p.nbytes for name, p in model.named_parameters() if name != "logit_scale")
    blocks = sum(p.nbytes for name, p in model.named_parameters() if "blocks." in name or "layers." in name)
    assert blocks > 0.8 * every
    # A tower's own weights stay from forward to backward, a block's come for both.
    assert traffic.host == 2 * blocks + (every - blocks) + every
    halves = plan_traffic(replace(job, devices=2), 0.0, sharded_units(model), [])
    assert halves.host == pytest.approx(traffic.host / 2, rel=0.01)  # and padding
    assert plan_traffic(replace(job, offload=False), 0.0, sharded_units(model), []).host == 0
    there, here = (
        time_step(job, FLOPS, BOTH, traffic, replace(DEVICE, device=device, host=1e9), "32", ASSUMED)
        for device in ("cuda", "cpu")
    )
    assert there.host == pytest.approx(traffic.host / 1e9)
    assert there.total - here.total == pytest.approx(there.host)


def test_files_of_before_there_were_float8_and_the_host_are_read(tmp_path):
    old = {"memory": 1e9, "bf16": 1e12, "fp32": 1e11, "link": 1e10, "network": 1e9}
    for name, device in (("NVIDIA H100 80GB HBM3", "cuda"), ("this processor, 2 thread(s)", "cpu")):
        (tmp_path / "old.json").write_text(json.dumps({"name": name, **old}))
        found = find_hardware(str(tmp_path / "old.json"))
        assert (found.name, found.device, found.float8, found.host) == (name, device, None, 32e9)
        assert {key: getattr(found, key) for key in old} == old


def test_hardware_is_of_the_table_or_of_a_file(tmp_path):
    assert find_hardware("h200").memory > find_hardware("h100").memory
    assert TABLE["a100"].rate("bf16-mixed") == 16 * TABLE["a100"].rate("32")
    write_hardware(DEVICE, tmp_path / "one.json")
    assert find_hardware(str(tmp_path / "one.json")) == DEVICE
    (tmp_path / "other.json").write_text(json.dumps({"name": "other"}))
    for name, message in (
        ("h1000", "did you mean h100"),
        (f"{tmp_path}/none.json", "No such file"),
        (f"{tmp_path}/other.json", "no file of `clip-plan calibrate`"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_hardware(name)


def test_this_processor_multiplies():
    found = measure_hardware(torch.device("cpu"), seconds=0.05)
    assert 1e8 < found.fp32 < 1e14
    assert found.memory > 1e9
