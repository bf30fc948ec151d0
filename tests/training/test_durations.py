import pytest

from clip_train.errors import ConfigError
from clip_train.training.durations import Clock

CLOCK = Clock(batch_size=100, epoch_samples=1000, total_samples=20_000)


@pytest.mark.parametrize(
    ("duration", "samples"),
    [
        ("20 steps", 2000),
        ("1 step", 100),
        ("3", 300),
        (3, 300),
        ("2.5 epochs", 2500),
        ("1epoch", 1000),
        ("5%", 1000),
        ("2 %", 400),
        ("10k samples", 10_000),
        ("1.5M samples", 1_500_000),
        ("1e3 samples", 1000),
        ("0.5B samples", 500_000_000),
    ],
)
def test_durations(duration, samples):
    assert CLOCK.samples(duration, "eval.every") == samples


@pytest.mark.parametrize("duration", ["", "often", "3 minutes", "-1 step", "k samples", "1.2.3 steps"])
def test_no_durations(duration):
    with pytest.raises(ConfigError, match=r"eval\.every="):
        CLOCK.samples(duration, "eval.every")


@pytest.mark.parametrize(
    ("duration", "samples"),
    [(None, None), ("2 epochs", 2000), ("150 samples", 150), ("0.001%", 100), ("1 sample", 100)],
)
def test_a_cadence_is_at_least_one_step(duration, samples):
    assert CLOCK.cadence(duration, "eval.every") == samples


@pytest.mark.parametrize("duration", [0, "0", "0%", "0.0 epochs"])
def test_a_cadence_of_nothing_is_refused(duration):
    with pytest.raises(ConfigError, match=r"checkpoint\.every=.* write null for never"):
        CLOCK.cadence(duration, "checkpoint.every")
    assert CLOCK.samples(duration, "optim.warmup") == 0


@pytest.mark.parametrize(
    ("length", "samples"),
    [
        ({"max_samples": 950}, 1000),
        ({"max_steps": 7}, 700),
        ({"max_epochs": 2}, 2000),
        ({"max_epochs": 0.55}, 600),
        ({"max_samples": "10k"}, 10_000),
        ({"max_steps": 1e3}, 100_000),
    ],
)
def test_length_of_a_run_in_whole_steps(length, samples):
    assert Clock.of_run(100, 1000, **length).total_samples == samples


@pytest.mark.parametrize(
    "length",
    [
        {},
        {"max_steps": 1, "max_epochs": 1},
        {"max_steps": 0},
        {"max_epochs": -1},
        {"max_steps": "x"},
        {"max_epochs": float("inf")},
    ],
)
def test_impossible_lengths(length):
    with pytest.raises(ConfigError, match="max_"):
        Clock.of_run(100, 1000, **length)
