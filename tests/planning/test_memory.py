"""Planned memory against that of real models."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from clip_train.commands.program import config_dir
from clip_train.models import create_dual_encoder
from clip_train.models.activation_checkpointing import MODES
from clip_train.planning.activations import measure_activations, measure_footprint
from clip_train.planning.job import Job
from clip_train.planning.memory import largest_micro_batch, loss_bytes, plan_memory
from clip_train.planning.states import States, count_states, sharded_units
from clip_train.planning.towers import PlannedModel
from clip_train.training.optim.optimizer import ADAMW_STATES, OPTIMIZERS, build_optimizer
from tests.models.configs import load_config
from tests.planning import steps

ADAMW_FEWER_BITS = [("adamw", {"state": state}) for state in ADAMW_STATES if state != "fp32"]
JOB = Job(8192, 8, 4, None, "ddp", "contrastive", "gather", 4, 512)


@pytest.fixture(scope="module")
def planned() -> PlannedModel:
    return PlannedModel(steps.VIT)


@pytest.mark.parametrize(("name", "state"), [*((name, {}) for name in OPTIMIZERS), *ADAMW_FEWER_BITS])
def test_what_a_rank_keeps_is_what_a_step_leaves(name, state, planned, nothing_is_compiled):
    optim = yaml.safe_load(Path(f"{config_dir()}/optim/{name}.yaml").read_text()) | state
    states = count_states(planned.model, optim)
    model = create_dual_encoder(**steps.VIT)
    optimizer = build_optimizer(model, optim, fused=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    assert states.optimizer == pytest.approx(sum(map(held_bytes, tensors)), rel=0.01)
    assert states.gradients == sum(p.nbytes for p in model.parameters())
    assert states.weights == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def held_bytes(tensor: torch.Tensor) -> int:
    """Of a quantized one, all that it is made of."""
    parts = getattr(tensor, "tensor_attrs", None)
    return tensor.nbytes if parts is None else sum(getattr(tensor, part).nbytes for part in parts)


def test_a_locked_tower_has_weights_and_no_more():
    locked = PlannedModel(steps.VIT, {"method": "lit", "lock": "image", "unlocked_groups": 0, "freeze_bn_stats": True})
    states = count_states(locked.model, {"lr": 1e-3, "weight_decay": 0.0}, averaged=True)
    learning = 4 * (locked.parameters()["text"] + 1)
    assert (states.gradients, states.optimizer, states.average) == (learning, 2 * learning, learning)


@pytest.mark.parametrize("config", [steps.VIT, steps.SIGLIP, steps.CONVNET], ids=["vit", "siglip", "convnext"])
@pytest.mark.parametrize("checkpointing", MODES)
def test_the_peak_of_a_step_is_that_of_a_real_one(config, checkpointing):
    footprint = measure_footprint(PlannedModel({**config, "grad_checkpointing": checkpointing}), 48)
    measured = steps.peak_of_step(config, 48, checkpointing)
    assert footprint.peak_with_gradients == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("checkpointing", MODES)
def test_so_it_is_in_bf16(checkpointing):
    """Of fewer pairs, as a processor without bf16 is slow; its kernels also convert more."""
    planned = PlannedModel({**steps.VIT, "grad_checkpointing": checkpointing}, precision="bf16-mixed")
    measured = steps.peak_of_step(steps.VIT, 24, checkpointing, precision="bf16-mixed")
    assert measure_footprint(planned, 24).peak_with_gradients == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("config", "precision", "within"),
    [(steps.VIT, "bf16-mixed", 0.15), (steps.WORDY, "32", 0.05)],
    ids=["vit", "wordy"],
)
def test_the_fullest_moment_is_that_of_a_real_run(config, precision, within):
    """From nothing: weights, gradients, AdamW's state, two batches and what a step needs."""
    pairs = 24
    planned = PlannedModel(config, precision=precision)
    states = count_states(planned.model, {"lr": 1e-3, "weight_decay": 0.0})
    job = Job(pairs, 1, 1, None, "ddp", "contrastive", "gather", 4, 64)
    memory = plan_memory(job, states, measure_activations(planned, pairs), [], 64, 32, "cpu")
    assert memory.peak == pytest.approx(steps.peak_of_run(config, pairs, precision), rel=within)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [None, 8])
def test_the_peak_of_a_large_one(micro_batch_size):
    """The last rows of the table in docs/planning.md."""
    config = load_config("vit_b_32", "model.text.vocab_size=49408", "model.text.length_multiple=null")
    planned, pairs = PlannedModel(config), 16
    states = States(0.0, 4.0 * sum(planned.parameters().values()), 0.0, 0.0)
    job = Job(pairs, 1, 1, micro_batch_size, "ddp", "contrastive", "gather", 4, config["embed_dim"])
    memory = plan_memory(job, states, measure_activations(planned, pairs), [], 224, 77, "cpu")
    measured = steps.peak_of_step(config, pairs, at_once=micro_batch_size)
    print(f"planned {(memory.peak - memory.batch) / 1e6:,.0f} MB, measured {measured / 1e6:,.0f} MB")
    assert memory.peak - memory.batch == pytest.approx(measured, rel=0.05)


def test_micro_batches_hold_the_gradients_of_the_others():
    planned = PlannedModel(steps.WORDY)
    states, activations = (
        States(0.0, 4.0 * sum(planned.parameters().values()), 0.0, 0.0),
        measure_activations(planned, 16),
    )
    job = Job(48, 1, 1, 16, "ddp", "contrastive", "gather", 4, 64)
    memory = plan_memory(job, states, activations, [], 64, 32, "cpu")
    measured = steps.peak_of_step(steps.WORDY, 48, at_once=16)
    assert memory.gradients > 0.3 * memory.peak
    assert memory.peak - memory.batch == pytest.approx(measured, rel=0.05)


def test_activations_grow_by_the_pair(planned):
    activations = measure_activations(planned, 64)
    footprint = measure_activations(planned, 512).at(512)
    assert activations.at(512).saved_total == pytest.approx(footprint.saved_total, rel=1e-6)
    assert activations.at(512).peak == pytest.approx(footprint.peak, rel=0.01)
    assert footprint.peak >= footprint.saved_total


def test_bf16_keeps_casts_of_the_weights_once_and_half_of_the_rest():
    full, half = (measure_activations(PlannedModel(steps.VIT, precision=p), 64) for p in ("32", "bf16-mixed"))
    assert 0.5 < half.at(512).saved_total / full.at(512).saved_total < 0.75


def test_a_rank_keeps_its_shard_and_of_what_is_offloaded_nothing(planned):
    states = States(400.0, 400.0, 800.0, 0.0)
    fixed = states, measure_activations(planned, 64), sharded_units(planned.model), 64, 32, "cuda"
    whole, cut = (plan_memory(replace(JOB, strategy=strategy), *fixed) for strategy in ("ddp", "fsdp"))
    assert (whole.weights, whole.gradients, whole.optimizer) == (400, 400, 800)
    assert (cut.weights, cut.gradients, cut.optimizer) == (400 / 32, 400 / 32, 800 / 32)
    offloaded = plan_memory(replace(JOB, strategy="fsdp", offload=True), *fixed)
    assert (offloaded.weights, offloaded.gradients, offloaded.optimizer) == (0, 0, 0)
    assert offloaded.peak == cut.peak - 1600 / 32
    cached = plan_memory(replace(JOB, micro_batch_size=64), *fixed)
    assert cached.batch == whole.batch + 4 * 256 * 512 * 4  # features and their gradients
    assert sum(cached.activations.values()) < sum(whole.activations.values()) / 3


@pytest.mark.parametrize(
    ("loss", "ranks", "exchange", "batch", "megabytes"),
    [  # measured, docs/large_batch.md
        ("contrastive", 1, "gather", 16384, 89),
        ("contrastive", 2, "ring", 16384, 109),
        ("contrastive", 1, "gather", 262144, 1095),
        ("contrastive", 1, "gather", 1048576, 4337),
        ("sigmoid", 1, "ring", 16384, 141),
    ],
)
def test_the_loss_takes_what_was_measured(loss, ranks, exchange, batch, megabytes):
    job = Job(batch, ranks, 1, None, "ddp", loss, exchange, 4, 512)
    assert loss_bytes(job, device="cpu") == pytest.approx(megabytes * 1e6, rel=0.25)


def test_the_largest_micro_batch_is_that_of_the_fewest_equal_ones():
    job = replace(JOB, batch_size=32 * 1000)
    assert largest_micro_batch(job, 100.0, lambda pairs: 10 + pairs) == 84  # 12 of them, as 90 would need
    assert largest_micro_batch(job, 5000.0, lambda pairs: 10 + pairs) == 1000
    assert largest_micro_batch(job, 5.0, lambda pairs: 10 + pairs) is None
