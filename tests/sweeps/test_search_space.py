import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from clip_train.errors import ConfigError
from clip_train.sweeps.search_space import split_overrides


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("1e-4,5e-4", CategoricalDistribution([1e-4, 5e-4])),
        ("vit_b_32,vit_b_16", CategoricalDistribution(["vit_b_32", "vit_b_16"])),
        ("choice([1,2],[3])", CategoricalDistribution(["[1,2]", "[3]"])),
        ("interval(1e-5,1e-3)", FloatDistribution(1e-5, 1e-3)),
        ("tag(log, interval(1e-5, 1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("int(interval(1,8))", IntDistribution(1, 8)),
        ("int(tag(log, interval(1,8)))", IntDistribution(1, 8, log=True)),
        ("range(1,10,3)", IntDistribution(1, 7, step=3)),
        ("range(0,1,step=0.25)", FloatDistribution(0, 0.75, step=0.25)),
    ],
)
def test_hydras_words(values, expected):
    space, fixed = split_overrides([f"optim.lr={values}", "max_steps=5"])
    assert space == {"optim.lr": expected}
    assert fixed == ["max_steps=5"]


def test_of_two_overrides_the_last_counts():
    space, fixed = split_overrides(["optim.lr=interval(0,1)", "seed=1,2", "optim.lr=0.5"])
    assert list(space) == ["seed"]
    assert fixed == ["optim.lr=0.5"]


@pytest.mark.parametrize(
    ("override", "message"),
    [("optim.lr=0.5", "nothing to search"), ("optim.lr=tag(log, interval(0, 1))", "optim.lr=tag")],
)
def test_what_cannot_be_searched_is_said(override, message):
    with pytest.raises(ConfigError, match=message):
        split_overrides([override])
