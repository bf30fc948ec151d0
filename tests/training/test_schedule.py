import math

import pytest

from clip_train.training.schedule import warmup_cosine


def rate(samples_seen: int) -> float:
    return warmup_cosine(samples_seen, batch_size=10, warmup_samples=100, total_samples=300)


def test_linear_then_cosine():
    assert [rate(10 * step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rate(100) == 1
    assert rate(200) == pytest.approx(0.5)
    assert rate(150) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rate(300) == 0
    assert rate(500) == 0


def test_no_warmup():
    assert warmup_cosine(0, batch_size=10, warmup_samples=0, total_samples=100) == 1


def test_a_warmup_shorter_than_a_step_does_not_overshoot():
    assert warmup_cosine(0, batch_size=10, warmup_samples=3, total_samples=100) == 1


def test_equals_open_clips():
    from open_clip_train.scheduler import cosine_lr

    class Optimizer:
        param_groups = [{"lr": 0.0}]  # noqa: RUF012

    optimizer = Optimizer()
    adjust = cosine_lr(optimizer, base_lr=1.0, warmup_length=10, steps=30)
    for step in range(30):
        adjust(step)
        assert rate(10 * step) == pytest.approx(optimizer.param_groups[0]["lr"])
