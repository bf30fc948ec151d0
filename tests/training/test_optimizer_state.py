"""AdamW with its moments in fewer bits: the way of fp32, less memory, and the same run after a resume."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clip_train.checkpoints.folder import list_checkpoints, read_checkpoint, verify
from clip_train.errors import ConfigError
from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder
from clip_train.training.optim.bad_step import clip_or_skip
from clip_train.training.optim.optimizer import ADAMW_STATES, build_optimizer, set_rates, with_settings_of
from clip_train.training.resume import _check_optimizer
from tests.checkpoints.states import assert_equal, state_of
from tests.checkpoints.test_folder import save
from tests.distributed.train_many import train_on
from tests.models.test_dual_encoder import TINY
from tests.training.test_optimizer import settings

FEWER_BITS = [state for state in ADAMW_STATES if state != "fp32"]


pytestmark = pytest.mark.usefixtures("nothing_is_compiled")  # torchao compiles the step for each shape


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_dual_encoder(**{**TINY, "text": {**TINY["text"], "vocab_size": 1000}})


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The losses of some steps on four batches in turn, whose noise is another each time."""
    losses = []
    for step in steps:
        torch.manual_seed(step % 4)
        pixels, ids = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.randint(1, 1000, (8, 16))
        set_rates(optimizer, 1 / (1 + step / 10))
        features: Any = model(pixels, ids)
        loss = contrastive_loss(*features, **model.logit_parameters())  # pyright: ignore[reportCallIssue]
        loss.backward()
        clip_or_skip(optimizer, model.parameters(), 1.0)
        torch.seed()  # as other ranks have other random numbers
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = optimizer.state_dict()["state"].values()
    return [value for state in states for name, value in state.items() if name != "step"]


def test_losses_are_those_of_fp32_and_memory_is_not():
    losses, size = {}, {}
    for state in ADAMW_STATES:
        model = make_model()
        optimizer = build_optimizer(model, settings("adamw", state=state), fused=True)
        losses[state] = torch.tensor(take_steps(model, optimizer, range(20)))
        size[state] = sum(tensor.nbytes for tensor in moments(optimizer))
    progress = losses["fp32"][0] - losses["fp32"][-1]
    assert progress > 0.5
    for state in FEWER_BITS:
        difference = (losses[state] - losses["fp32"]).abs().max()
        assert 0 < difference < 0.05 * progress, state
    assert size["bf16"] == size["fp32"] / 2
    assert size["8bit"] < 0.28 * size["fp32"]  # a small model has more small tensors, in fp32


def test_bf16_takes_steps_that_are_too_small_for_it():
    """A second moment falls as 0.999^t after its gradient has gone; rounded to the nearest it would stay."""
    weight = nn.Parameter(torch.zeros(4096))
    model = nn.ParameterDict({"weight": weight})
    optimizer = build_optimizer(model, settings("adamw", state="bf16", betas=[0.9, 0.999]), fused=True)
    for step in range(301):
        weight.grad = torch.full_like(weight, float(step == 0))
        optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    assert second == pytest.approx(0.001 * 0.999**300, rel=0.01)


@pytest.mark.parametrize("state", FEWER_BITS)
def test_four_steps_are_two_and_a_checkpoint_and_two(state, tmp_path):
    optim = settings("adamw", state=state)
    whole, first, second = make_model(), make_model(), make_model(seed=1)
    optimizer, halves = build_optimizer(whole, optim, fused=True), []
    take_steps(whole, optimizer, range(4))
    halves.append(build_optimizer(first, optim, fused=True))
    take_steps(first, halves[0], range(2))
    saved = read_checkpoint(save(tmp_path / "half.ckpt", state_of(first, halves[0])))
    second.load_state_dict(saved["state_dict"])
    halves.append(build_optimizer(second, optim, fused=True))
    halves[1].load_state_dict(with_settings_of(halves[1], saved["optimizer_states"][0], second))
    take_steps(second, halves[1], range(2, 4))
    assert_equal(second.state_dict(), whole.state_dict())
    assert_equal(halves[1].state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("state", FEWER_BITS)
def test_a_bad_step_changes_nothing(state):
    model = make_model()
    optimizer = build_optimizer(model, settings("adamw", state=state), fused=True)
    take_steps(model, optimizer, range(2))
    before = [tensor.clone() for tensor in (*model.parameters(), *moments(optimizer))]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan") if parameter.ndim == 0 else 1.0)
    assert not clip_or_skip(optimizer, model.parameters(), 1.0).isfinite()
    optimizer.step()
    assert_equal([*model.parameters(), *moments(optimizer)], before)
    assert {float(values["step"]) for values in optimizer.state_dict()["state"].values()} == {2.0}


@pytest.mark.parametrize("state", FEWER_BITS)
def test_a_state_goes_on_with_other_rates(state):
    model = make_model()
    optimizer = build_optimizer(model, settings("adamw", state=state), fused=True)
    take_steps(model, optimizer, range(2))
    changed = settings("adamw", state=state, lr=0.5, vision={"layer_decay": 0.5}, text={"lr": 0.1})
    other = build_optimizer(model, changed, fused=True)
    expected = [group["initial_lr"] for group in other.param_groups]
    other.load_state_dict(with_settings_of(other, optimizer.state_dict(), model))
    assert [group["initial_lr"] for group in other.param_groups] == expected
    set_rates(other, 0.5)
    assert [float(group["lr"]) for group in other.param_groups] == pytest.approx([rate / 2 for rate in expected])
    found, before = (
        dict(zip((id(p) for g in o.param_groups for p in g["params"]), o.state_dict()["state"].values()))
        for o in (other, optimizer)
    )
    for parameter in model.parameters():
        assert_equal(found[id(parameter)], before[id(parameter)])


def test_fp32_and_bf16_read_each_others_state():
    model = make_model()
    fp32, bf16 = (build_optimizer(model, settings("adamw", state=state), fused=True) for state in ("fp32", "bf16"))
    take_steps(model, fp32, range(2))
    bf16.load_state_dict(with_settings_of(bf16, fp32.state_dict(), model))
    assert_equal(moments(bf16), [moment.to(torch.bfloat16) for moment in moments(fp32)])
    fp32.load_state_dict(with_settings_of(fp32, bf16.state_dict(), model))
    assert_equal(moments(fp32), [moment.float() for moment in moments(bf16)])


def test_what_8bit_left_goes_on_as_8bit_only():
    kinds = {state: {"optim": {"state": state}} for state in ADAMW_STATES}
    for before, now in (("8bit", "fp32"), ("bf16", "8bit")):
        with pytest.raises(ConfigError, match=f"state of optim=adamw.* init_from={before}$"):
            _check_optimizer(Path(before), kinds[before], kinds[now])
    _check_optimizer(Path("any"), {"optim": {"name": "adamw"}}, kinds["bf16"])


RUN = "max_steps=4 checkpoint.every=2 checkpoint.keep=2 optim.warmup=0 batch_size=8 data.num_workers=0 ema.decay=0.9"


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    runs = []
    for state in FEWER_BITS:
        half = f"{tmp_path}/{state}/checkpoints/samples_00000000000016.ckpt"
        run = f"{RUN} optim.state={state}"
        runs += [f"{state} {run}", f"{state}-resumed {run} resume={half}"]
    train_on(1, tmp_path, *runs)
    for state in FEWER_BITS:
        whole, resumed = (
            verify(list_checkpoints(Path(tmp_path, name) / "checkpoints")[-1]).files
            for name in (state, f"{state}-resumed")
        )
        for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
            assert whole[name] == resumed[name], (state, name)
    sizes = [verify(list_checkpoints(tmp_path / state / "checkpoints")[-1]).files for state in FEWER_BITS]
    assert sizes[1]["optimizer.safetensors"].bytes < 0.6 * sizes[0]["optimizer.safetensors"].bytes


def test_without_torchao(monkeypatch):
    monkeypatch.delitem(sys.modules, "clip_train.training.optim.adamw_8bit", raising=False)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"needs torchao: pip install '\.\[torchao\]' in the checkout"):
        build_optimizer(make_model(), settings("adamw", state="8bit"), fused=False)
