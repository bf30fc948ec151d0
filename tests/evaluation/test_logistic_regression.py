import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from clip_train.evaluation import logistic_regression
from clip_train.evaluation.logistic_regression import (
    STRENGTHS,
    choose_strength,
    fit_logistic_regression,
    validation_split,
    with_ones,
)
from tests.ranks import run_on_ranks


def problem(count: int = 90, width: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    means = torch.randn(classes, width, generator=generator)
    return means[labels] + torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize("C", [1e-3, 0.316, 30.0])
def test_equals_scikit_learn(C):
    features, labels = problem()
    head = fit_logistic_regression(features, labels, 4, C)
    reference = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(features.double().numpy(), labels.numpy())
    assert np.allclose(head[:, :-1], reference.coef_, atol=1e-3)
    # A constant added to all biases changes nothing.
    assert np.allclose(head[:, -1] - head[:, -1].mean(), reference.intercept_ - reference.intercept_.mean(), atol=1e-3)
    probabilities = (with_ones(features) @ head.T).softmax(1)
    assert np.allclose(probabilities, reference.predict_proba(features.double().numpy()), atol=1e-4)


def test_the_gradient_vanishes_in_the_solution():
    features, labels = problem()
    head = fit_logistic_regression(
        features, labels, 5, 10.0, tolerance=1e-9
    ).requires_grad_()  # a class without samples
    losses = torch.nn.functional.cross_entropy(with_ones(features) @ head.T, labels, reduction="sum")
    (losses + head[:, :-1].square().sum() / 20).backward()
    assert head.grad is not None and head.grad.abs().max() < 1e-5


def test_rows_at_a_time_give_what_all_at_once_give(monkeypatch):
    features, labels = problem()
    whole = fit_logistic_regression(features, labels, 4, 30.0, tolerance=1e-12)
    monkeypatch.setattr(logistic_regression, "_ROWS", 7)
    assert torch.allclose(fit_logistic_regression(features, labels, 4, 30.0, tolerance=1e-12), whole, atol=1e-9)


def test_the_same_on_any_number_of_ranks():
    expected = fit_on_share(0, 1)
    for found in run_on_ranks(fit_on_own_share, 3):
        assert torch.allclose(found, expected, atol=1e-6)


def fit_on_own_share() -> torch.Tensor:
    from clip_train.distributed import group_rank, group_size

    return fit_on_share(group_rank(), group_size())


def fit_on_share(rank: int, ranks: int) -> torch.Tensor:
    features, labels = problem()
    return fit_logistic_regression(features[rank::ranks], labels[rank::ranks], 4, 1.0)


@pytest.mark.parametrize("peak", [0, 1, 37, 50, 95, 96])
def test_the_search_finds_a_single_peak_with_few_fits(peak):
    found, tried = choose_strength(lambda C: -abs(np.log10(C) - np.log10(STRENGTHS[peak])))
    assert found == STRENGTHS[peak]
    assert list(tried) == sorted(tried) and len(tried) <= 7 + 4 * 2
    assert (STRENGTHS[0], STRENGTHS[48], STRENGTHS[96]) == (1e-6, 1, 1e6)


def test_of_equal_scores_the_smallest_strength_wins():
    assert choose_strength(lambda C: 0.5)[0] == STRENGTHS[0]


def test_a_split_has_the_same_share_of_every_class():
    labels = np.array([0] * 10 + [2] * 25 + [1] * 3)[np.random.default_rng(0).permutation(38)]
    train, validation = validation_split(labels, 0.2)
    assert np.bincount(labels[validation], minlength=3).tolist() == [2, 0, 5]
    assert sorted([*train, *validation]) == list(range(38))
    assert all((a == b).all() for a, b in zip(validation_split(labels, 0.2), (train, validation)))
