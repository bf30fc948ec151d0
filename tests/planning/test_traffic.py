"""Planned bytes on the wire, and of gradients that are not exchanged yet, against those of real ranks, to the byte."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from clip_train.losses import contrastive_loss, sigmoid_loss
from clip_train.models import create_dual_encoder
from clip_train.planning.activations import measure_activations
from clip_train.planning.job import Job
from clip_train.planning.memory import plan_memory
from clip_train.planning.states import beside_towers, count_states, sharded_units
from clip_train.planning.towers import PlannedModel
from clip_train.planning.traffic import plan_traffic
from clip_train.training.cached_gradients import cached_backward
from clip_train.training.fsdp import average_gradients, shard_towers
from scripts.bench.measure import WireBytes
from tests.planning import steps
from tests.ranks import RankPool

BATCH = 12
BIAS = {"init_logit_bias": -10.0}
VIT = steps.VIT | {"image_size": 16}
VIT_WIDTH = 64


@pytest.fixture(scope="module")
def pair():
    """Two ranks that are all the world there is."""
    pool = RankPool(2)
    yield pool
    pool.close()


def planned_bytes(config: dict, job: Job, precision: str = "32") -> float:
    model = PlannedModel(config).model
    learning = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return plan_traffic(job, learning, sharded_units(model, precision), beside_towers(model)).total


def sent_bytes(config: dict, job: Job, precision: str = "32") -> float:
    """By this rank in the third step, after the buckets are made."""
    model = create_dual_encoder(**config)
    loss = partial(sigmoid_loss if job.loss == "sigmoid" else contrastive_loss, exchange=job.exchange)
    pixels = torch.zeros(job.local_batch, 3, config["image_size"], config["image_size"], dtype=torch.uint8)
    ids = torch.zeros(job.local_batch, config["text"]["context_length"], dtype=torch.int64)
    step = _ddp_step(model) if job.strategy == "ddp" else _fsdp_step(model, job.micro_batch_size, precision)
    for _ in range(2):
        step(loss, pixels, ids)
    with WireBytes() as wire:
        step(loss, pixels, ids)
    return wire.sent


def _ddp_step(model):
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    def step(loss, pixels, ids):
        loss(*wrapped(pixels, ids), **model.logit_parameters()).backward()

    return step


def _fsdp_step(model, micro_batch_size, precision):
    rounded = precision == "bf16-mixed"
    shard_towers(model, init_device_mesh("cpu", (2,)), rounded)
    shards = [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]

    def backward(surrogate, last):
        for shard in shards:
            shard.set_requires_gradient_sync(last, recurse=False)
        surrogate.backward()
        if last:
            average_gradients(model.parameters())

    @torch.autocast("cpu", torch.bfloat16, enabled=rounded)
    def step(loss, pixels, ids):
        if micro_batch_size is None:
            backward(loss(*model(pixels, ids), **model.logit_parameters()), True)
        else:
            logits = model.logit_parameters()
            cached_backward(model, loss, logits, (pixels, ids), micro_batch_size=micro_batch_size, backward=backward)
        model.zero_grad()

    return step


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
def test_ddp_sends_what_is_planned(pair, loss, exchange):
    config = VIT | (BIAS if loss == "sigmoid" else {})
    job = Job(BATCH, 2, 1, None, "ddp", loss, exchange, 4, VIT_WIDTH)
    assert pair.run(sent_bytes, config, job) == [planned_bytes(config, job)] * 2


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_fsdp_sends_what_is_planned(pair, micro_batch_size, checkpointing, precision):
    job = Job(BATCH, 2, 1, micro_batch_size, "fsdp", "contrastive", "gather", 4, VIT_WIDTH)
    config = VIT | {"grad_checkpointing": checkpointing}
    assert pair.run(sent_bytes, config, job, precision) == [planned_bytes(config, job, precision)] * 2


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
    memory = plan_memory(job, states, activations, units, VIT["image_size"], planned.context_length)
    assert pair.run(held_gradients, VIT, job) == [pytest.approx(memory.gradients, rel=0.01)] * 2
    offloaded = plan_memory(replace(job, offload=True), states, activations, units, 16, planned.context_length)
    assert (offloaded.gradients, offloaded.weights) == (memory.gradients, 0)


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
