"""Planned bytes on the wire, and of gradients that are not exchanged yet, against those of real ranks, to the byte."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder
from clip_train.planning.activations import measure_activations
from clip_train.planning.hardware import Hardware, write_hardware
from clip_train.planning.job import Job
from clip_train.planning.memory import plan_memory
from clip_train.planning.plan import Planner
from clip_train.planning.states import States, beside_towers, count_states, sharded_units
from clip_train.planning.towers import PlannedModel
from clip_train.planning.traffic import plan_traffic
from clip_train.training.cached_gradients import cached_backward
from clip_train.training.fsdp import average_gradients, shard_towers
from scripts.bench.measure import WireBytes
from tests.cli.warm_start import run_module
from tests.distributed import train_many
from tests.planning import sent_bytes, steps
from tests.ranks import RankPool

BATCH = 12
VIT = steps.VIT | {"image_size": 16}
VIT_WIDTH = 64
PAIRS = 20  # of the runs
FIXED = f"batch_size={PAIRS} max_steps={sent_bytes.STEPS} data.num_workers=0 logger=csv checkpoint.every=null"
SIGMOID = "loss=sigmoid model.init_logit_bias=-10"
DECODER = "model.decoder={layers:2,heads:2,attn_pooler_queries:5,attn_pooler_heads:2}"
LOCKED = "finetune=lit init_from=BASE"
RUNS = {
    "gather": "",
    "ring": "loss.exchange=ring",
    "rounded": "loss.matmul_dtype=bfloat16",
    "sigmoid_gather": f"{SIGMOID} loss.exchange=gather",
    "sigmoid_ring": f"{SIGMOID} loss.exchange=ring",
    "captioning": f"loss=captioning model.embed_dim=32 {DECODER}",
    "cached": "micro_batch_size=4",
    "locked": LOCKED,
    "sharded": "trainer.strategy=fsdp",
    "sharded_cached": "trainer.strategy=fsdp micro_batch_size=4 model.grad_checkpointing=selective",
    "sharded_locked_cached": f"trainer.strategy=fsdp micro_batch_size=4 {LOCKED}",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run folders of two ranks, with what one has sent in a step."""
    folder = tmp_path_factory.mktemp("runs")
    base = f"{folder}/gather/checkpoints/samples_{sent_bytes.STEPS * PAIRS:014d}.ckpt"
    arguments = [f"{name} {FIXED} {keys.replace('BASE', base)}" for name, keys in RUNS.items()]
    done = run_module("tests.planning.sent_bytes", [str(folder), *arguments], os.environ, 900, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_step_of_a_run_sends_what_is_planned(runs, name):
    write_hardware(Hardware("one", 1e9, 1e9, 1e9, 1e9, 1e9, device="cpu"), runs / "one.json")
    fixed = f"{FIXED} trainer.devices=2 plan.hardware={runs}/one.json"
    planner = Planner(train_many.compose_run("plan", *fixed.split(), *RUNS[name].split()))
    assert json.loads((runs / name / "sent.json").read_text()) == planner.traffic(planner.job).total


@pytest.fixture(scope="module")
def pair():
    """Two ranks that are all the world there is."""
    pool = RankPool(2)
    yield pool
    pool.close()


def planned_bytes(config: dict, job: Job, precision: str = "32") -> float:
    """Of the towers and the loss."""
    model = PlannedModel(config).model
    learning = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    traffic = plan_traffic(job, learning, sharded_units(model, precision), beside_towers(model))
    return traffic.total - traffic.numbers


def sent_by_fsdp(config: dict, job: Job) -> float:
    """By this rank in a step under autocast to bf16, which a run refuses on a processor without bf16."""
    model = create_dual_encoder(**config)
    shard_towers(model, init_device_mesh("cpu", (2,)), rounded=True)
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    pixels = torch.zeros(job.local_batch, 3, config["image_size"], config["image_size"], dtype=torch.uint8)
    ids = torch.zeros(job.local_batch, config["text"]["context_length"], dtype=torch.int64)

    def backward(surrogate, last):
        for shard in shards:
            shard.set_requires_gradient_sync(last, recurse=False)
        surrogate.backward()
        if last:
            average_gradients(model.parameters())

    with WireBytes() as wire, torch.autocast("cpu", torch.bfloat16):
        cached_backward(
            model,
            contrastive_loss,
            model.logit_parameters(),
            (pixels, ids),
            micro_batch_size=job.at_once,
            backward=backward,
        )
    return wire.sent


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_fsdp_sends_rounded_weights_as_planned(pair, micro_batch_size, checkpointing):
    job = Job(BATCH, 2, 1, micro_batch_size, "fsdp", "contrastive", "gather", 4, VIT_WIDTH)
    config = VIT | {"grad_checkpointing": checkpointing}
    assert pair.run(sent_by_fsdp, config, job) == [planned_bytes(config, job, "bf16-mixed")] * 2


def held_gradients(config: dict, job: Job) -> int:
    """Bytes of gradients on this rank before the last of the micro-batches, which exchanges them."""
    model = create_dual_encoder(**config)
    shard_towers(model, init_device_mesh("cpu", (2,)))
    used: dict[int, torch.Tensor] = {}
    for module in model.modules():  # an exchange leaves them shards, which no forward uses
        module.register_forward_hook(
            lambda module, *_: used.update({id(p): p for p in module.parameters(False) if not isinstance(p, DTensor)})
        )
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    held = []

    def backward(surrogate, last):
        held.append(sum(p.grad.nbytes for p in used.values() if p.grad is not None))
        for shard in shards:
            shard.set_requires_gradient_sync(last, recurse=False)
        surrogate.backward()

    pixels = torch.zeros(job.local_batch, 3, config["image_size"], config["image_size"], dtype=torch.uint8)
    ids = torch.zeros(job.local_batch, config["text"]["context_length"], dtype=torch.int64)
    inputs, size = (pixels, ids), job.at_once
    cached_backward(model, contrastive_loss, model.logit_parameters(), inputs, micro_batch_size=size, backward=backward)
    return held[-1]


def test_micro_batches_of_fsdp_add_up_whole_gradients(pair):
    job = Job(BATCH, 2, 1, 2, "fsdp", "contrastive", "gather", 4, VIT_WIDTH)
    planned = PlannedModel(VIT)
    states = count_states(planned.model, {"lr": 1e-3, "weight_decay": 0.0})
    activations = measure_activations(planned, 64)
    units = sharded_units(planned.model)
    inputs = VIT["image_size"], planned.context_length
    memory = plan_memory(job, states, activations, units, *inputs, "cpu")
    assert pair.run(held_gradients, VIT, job) == [pytest.approx(memory.gradients, rel=0.01)] * 2
    offloaded = plan_memory(replace(job, offload=True), states, activations, units, *inputs, "cpu")
    assert (offloaded.gradients, offloaded.weights) == (memory.gradients, 0)


def test_what_fsdp_gathers_of_blocks_has_room(pair):
    """The rule is for exchanges that go on behind a GPU's computing, with more buffers at once than gloo has."""
    pairs, config = 8, steps.WIDE
    planned = PlannedModel(config)
    states = States(0.0, 4.0 * sum(planned.parameters().values()), 0.0, 0.0)
    job = Job(2 * pairs, 2, 1, None, "fsdp", "contrastive", "gather", 4, config["embed_dim"])
    activations, units = measure_activations(planned, pairs), sharded_units(planned.model)
    memory = plan_memory(job, states, activations, units, 64, 32, "cpu")
    step = memory.peak - memory.batch
    measured = pair.run(steps.peak_of_shards, config, pairs)
    assert all(step / 2 < found < step for found in measured)


def test_one_process_sends_nothing():
    job = Job(BATCH, 1, 1, None, "ddp", "contrastive", "gather", 4, VIT_WIDTH)
    assert planned_bytes(VIT, job) == 0


def test_the_ring_sends_half_as_much_again_and_sixteen_bits_half_the_features():
    """The table of docs/large_batch.md: (W-1) bD and (W-1) bD for gather, (W-1) bD and (2W-1) bD for ring."""
    gather, ring = (Job(32768, 8, 1, None, "ddp", "contrastive", e, 4, 512) for e in ("gather", "ring"))
    none = (0.0, [], [])
    ratio = plan_traffic(ring, *none).loss / plan_traffic(gather, *none).loss
    assert ratio == pytest.approx((7 + 15) / 14, rel=0.01)
    rounded = Job(32768, 8, 1, None, "ddp", "contrastive", "gather", 2, 512)
    features = plan_traffic(rounded, *none).features / plan_traffic(gather, *none).features
    assert features == pytest.approx(0.5, abs=0.01)
