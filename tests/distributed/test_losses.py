"""Losses and gradients on 1 to 4 ranks against the definition on one, in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clip_train.distributed import group_rank, group_size
from clip_train.losses import UnequalBatchesError, contrastive_loss, sigmoid_loss
from tests.losses import references
from tests.losses.references import KINDS, unit_vectors
from tests.ranks import pool_group

LOSSES = {"contrastive": (contrastive_loss, references.contrastive), "sigmoid": (sigmoid_loss, references.sigmoid)}
NAMES = ("image", "text", "scale", "bias")


def inputs_of(loss: str, kind: str, count: int, dim: int, scale: float) -> list[Tensor]:
    scalars = [scale] if loss == "contrastive" else [scale, -10.0]
    return [*unit_vectors(kind, count, dim), *(torch.tensor(x, dtype=torch.float64) for x in scalars)]


def on_one_rank(loss: str, inputs: list[Tensor], dtype, ranks: int, options: dict) -> tuple[float, list[Tensor]]:
    """The loss of this rank's share of the batch, and its gradients."""
    group = pool_group(ranks)
    b = len(inputs[0]) // group_size(group)
    own = slice(group_rank(group) * b, (group_rank(group) + 1) * b)
    leaves = [(x[own] if x.ndim else x).to(dtype).requires_grad_() for x in inputs]
    value = LOSSES[loss][0](*leaves, group=group, **options)
    value.backward()
    return value.item(), [x.grad.double() for x in leaves if x.grad is not None]


def averaged(results: list[tuple[float, list[Tensor]]]) -> list[Tensor]:
    """What averaging gradients over ranks makes of theirs: each row's comes from the rank that has it."""
    ranks = len(results)
    per_input = list(zip(*(grads for _, grads in results), strict=True))
    return [torch.cat(gs) / ranks if gs[0].ndim else torch.stack(gs).mean() for gs in per_input]


def check(pool, loss: str, exchange: str, ranks: int, b: int, dim: int, scale: float, kind: str, dtype) -> None:
    inputs = inputs_of(loss, kind, b * ranks, dim, scale)
    results = pool.run(on_one_rank, loss, inputs, dtype, ranks, {"exchange": exchange}, ranks=ranks)
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = LOSSES[loss][1](*leaves)
    expected_grads = torch.autograd.grad(expected, leaves)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    assert len({value for value, _ in results}) == 1  # the same on every rank, to the bit
    assert results[0][0] == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    for name, found, grad in zip(NAMES, averaged(results), expected_grads):
        error = (found - grad).norm()
        # Gradients can cancel to nothing; what remains is rounding of terms of size scale / B in B rows, or of size 1.
        floor = tolerance * (scale / len(inputs[0]) ** 0.5 if grad.ndim else 1)
        assert error <= 10 * tolerance * grad.norm() + floor, name


CASES = st.fixed_dictionaries(
    {
        "loss": st.sampled_from(sorted(LOSSES)),
        "exchange": st.sampled_from(["gather", "ring"]),
        "ranks": st.integers(1, 4),
        "b": st.one_of(st.integers(1, 40), st.sampled_from([383, 385, 768, 770])),
        "dim": st.integers(1, 40),
        "scale": st.sampled_from([1.0, 1 / 0.07, 100.0]),
        "kind": st.sampled_from(KINDS),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
    }
)


@settings(max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=CASES)
def test_equals_the_definition(pool, case):
    check(pool, **case)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_several_tiles_on_three_ranks(pool, loss, exchange, kind):
    check(pool, loss, exchange, ranks=3, b=1030, dim=7, scale=100.0, kind=kind, dtype=torch.float32)


def unequal(ranks: int, loss: str) -> str:
    group = pool_group(ranks)
    b = 5 if group_rank(group) == 1 else 4
    features = torch.ones(b, 3)
    scalars = [torch.tensor(1.0)] * (1 if loss == "contrastive" else 2)
    with pytest.raises(UnequalBatchesError) as error:
        LOSSES[loss][0](features, features, *scalars, group=group)
    return str(error.value)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_unequal_batches_are_an_error_on_every_rank(pool, loss):
    messages = pool.run(unequal, 3, loss, ranks=3)
    assert all("equally many" in message and "(4, 3) and (5, 3)" in message for message in messages)


def no_pairs_on_one_rank(ranks: int) -> str:
    group = pool_group(ranks)
    image, text = torch.ones(4, 3), torch.ones(3 if group_rank(group) == 0 else 4, 3)
    with pytest.raises(UnequalBatchesError) as error:
        contrastive_loss(image, text, torch.tensor(1.0), group=group)
    return str(error.value)


def test_features_that_are_no_pairs_are_an_error_on_every_rank(pool):
    assert "no pairs" in pool.run(no_pairs_on_one_rank, 2, ranks=2)[0]


def locked_gradients(ranks: int, inputs: list[Tensor], exchange: str, locked: str) -> list[Tensor | None]:
    group = pool_group(ranks)
    b = len(inputs[0]) // ranks
    own = slice(group_rank(group) * b, (group_rank(group) + 1) * b)
    leaves = [(x[own] if x.ndim else x).clone().requires_grad_(name != locked) for name, x in zip(NAMES, inputs)]
    loss = contrastive_loss if len(inputs) == 3 else sigmoid_loss
    loss(*leaves, group=group, exchange=exchange).backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("locked", NAMES)
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_locked_input_has_no_gradient_and_changes_no_other(pool, loss, locked):
    inputs = inputs_of(loss, "random", 12, 5, 14.3)
    for exchange in ("gather", "ring"):
        free = pool.run(locked_gradients, 2, inputs, exchange, "none", ranks=2)
        for rank, grads in enumerate(pool.run(locked_gradients, 2, inputs, exchange, locked, ranks=2)):
            for name, grad, expected in zip(NAMES, grads, free[rank]):
                assert (grad is None) if name == locked else torch.equal(grad, expected)
