import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from clip_train.commands.program import config_dir
from clip_train.errors import ConfigError
from clip_train.training.durations import Clock
from clip_train.training.optim.schedule import COSINE, SHAPES, Schedule, make_schedule

# 10 steps of warm-up, 30 in all.
BATCH, WARMUP, STEPS = 10, 10, 30
COOLDOWN = {"cooldown": "9 steps", "cooldown_shape": "power", "cooldown_power": 1.0, "end_factor": 0.0}


def schedule(settings: Mapping[str, Any], warmup_steps: int = WARMUP) -> Schedule:
    clock = Clock(BATCH, epoch_samples=50, total_samples=STEPS * BATCH)
    return make_schedule(settings, clock, warmup_steps * BATCH)


def rates(of: Schedule, steps: range = range(STEPS)) -> list[float]:
    return [of(BATCH * step) for step in steps]


def open_clips(adjust: str, *arguments: float) -> list[float]:
    """The rates that a function of open_clip's scheduler gives."""
    from open_clip_train import scheduler

    class Optimizer:
        param_groups = [{"lr": 0.0}]  # noqa: RUF012

    optimizer, found = Optimizer(), []
    step_to_rate = getattr(scheduler, adjust)(optimizer, 1.0, WARMUP, STEPS, *arguments)
    for step in range(STEPS):
        step_to_rate(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def torchs(scheduler: type, **arguments: Any) -> list[float]:
    """The rates that a scheduler of torch's gives after the warm-up."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    steps, found = scheduler(optimizer, **arguments), []
    for _ in range(STEPS - WARMUP):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        steps.step()
    return found


def test_linear_warmup_then_cosine():
    rate = schedule(COSINE)
    assert rates(rate, range(10)) == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rate(100) == 1
    assert rate(200) == pytest.approx(0.5)
    assert rate(150) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rate(300) == 0
    assert rate(500) == 0


def test_no_warmup():
    assert schedule(COSINE, warmup_steps=0)(0) == 1


def test_a_warmup_shorter_than_a_step_does_not_overshoot():
    clock = Clock(BATCH, epoch_samples=50, total_samples=100)
    assert make_schedule(COSINE, clock, warmup_samples=3)(0) == 1


@pytest.mark.parametrize(
    ("name", "settings", "theirs"),
    [
        ("cosine", {"end_factor": 0.0}, ("cosine_lr",)),
        ("constant", COOLDOWN | {"cooldown": 0}, ("const_lr",)),
        ("constant", COOLDOWN, ("const_lr_cooldown", 9)),
        ("constant", COOLDOWN | {"cooldown_power": 2, "end_factor": 0.1}, ("const_lr_cooldown", 9, 2, 0.1)),
    ],
)
def test_equals_open_clips(name, settings, theirs):
    assert rates(schedule({"name": name, **settings})) == pytest.approx(open_clips(*theirs))


@pytest.mark.parametrize(
    ("name", "settings", "theirs"),
    [
        ("cosine", {"end_factor": 0.1}, ("CosineAnnealingLR", {"T_max": 20, "eta_min": 0.1})),
        ("linear", {"end_factor": 0.1}, ("LinearLR", {"start_factor": 1, "end_factor": 0.1, "total_iters": 20})),
        ("warm_restarts", {"period": "5 steps", "period_factor": 1, "end_factor": 0.1}, {"T_0": 5}),
        ("warm_restarts", {"period": "3 steps", "period_factor": 2, "end_factor": 0.1}, {"T_0": 3, "T_mult": 2}),
    ],
)
def test_equals_torchs(name, settings, theirs):
    kind, arguments = (
        theirs if isinstance(theirs, tuple) else ("CosineAnnealingWarmRestarts", {"eta_min": 0.1, **theirs})
    )
    expected = torchs(getattr(torch.optim.lr_scheduler, kind), **arguments)
    assert rates(schedule({"name": name, **settings}), range(WARMUP, STEPS)) == pytest.approx(expected)


def test_rsqrt_equals_big_visions_after_the_warmup():
    found = rates(schedule({"name": "rsqrt", **COOLDOWN, "timescale": "4 steps"}))
    expected = [min(1, (step + 1) / WARMUP) / math.sqrt(1 + max(0, step - WARMUP) / 4) for step in range(STEPS)]
    assert found == pytest.approx([rate * min(1, (STEPS - step) / 9) for step, rate in enumerate(expected)])


def test_a_cooldown_by_one_minus_the_root():
    found = rates(schedule({"name": "constant", **COOLDOWN, "cooldown_shape": "1-sqrt"}), range(STEPS - 9, STEPS + 1))
    assert found == pytest.approx([1 - math.sqrt(gone / 9) for gone in range(10)])


def from_file(name: str) -> dict[str, Any]:
    group: Any = OmegaConf.to_container(OmegaConf.load(Path(config_dir()) / "schedule" / f"{name}.yaml"))
    return group


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("warmup", [0, 2000, 20_000])
def test_the_files_schedules_have_no_jumps(name, warmup):
    clock = Clock(1, epoch_samples=100, total_samples=10_000)
    factors = [*map(make_schedule(from_file(name), clock, warmup), range(0, 10_000, 5))]
    assert all(0 <= factor <= 1 for factor in factors)
    steps = sorted(now - before for before, now in pairwise(factors))
    if name == "warm_restarts":
        steps = steps[:-3] if warmup < 10_000 else steps  # up to the peak again
    assert max(map(abs, steps)) < 0.01


def test_every_schedule_has_its_file():
    files = {path.stem for path in (Path(config_dir()) / "schedule").glob("*.yaml")}
    assert files == set(SHAPES) == {from_file(name)["name"] for name in files}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rsqrt", {"end_factor": 0.0}, r"schedule.name=rsqrt needs cooldown: choose its file, schedule=rsqrt"),
        ("linear", COOLDOWN, r"schedule.name=linear has no cooldown"),
        ("constant", COOLDOWN | {"cooldown": "a while"}, r"schedule.cooldown='a while' is no duration"),
        (
            "warm_restarts",
            {"period": 0, "period_factor": 1, "end_factor": 0},
            r"schedule.period=0 is no length of time",
        ),
    ],
)
def test_settings_that_make_no_schedule(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        schedule({"name": name, **settings})
