"""Logistic regression on features, and the strength of its regularisation: the linear probe of the CLIP paper."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clip_train.data.keyed_random import VALIDATION_SPLIT, keyed_uniforms
from clip_train.distributed import group_rank, sum_over_ranks
from clip_train.heartbeat import beat

# Radford et al. (2021), A.3: 10^-6 to 10^6 in eighths of a decade, approached from every second decade.
STRENGTHS = tuple(10.0 ** (eighth / 8) for eighth in range(-48, 49))
_FIRST_STEP = 16
_CONJUGATE_GRADIENTS = 250  # of one step


@torch.no_grad()
def fit_logistic_regression(
    features: Float[Tensor, "n width"],
    labels: Int64[Tensor, " n"],
    num_classes: int,
    C: float,
    *,
    max_iter: int = 1000,
    tolerance: float = 1e-7,
) -> Float[Tensor, "classes width_and_1"]:
    """Multinomial logistic regression over all samples of all ranks at once, in float64.

    It minimises what scikit-learn's LogisticRegression does: the sum of cross-entropies + |W|^2 / (2 C), with a bias
    that is not regularised. Where a probe trained by steps depends on a learning rate and an order, this has one
    solution, the same with any number of ranks.

    The method is Newton's, each step solved by conjugate gradients (Nocedal and Wright, 7.1), on whitened features. On
    the raw features of a trunk L-BFGS is not done after a thousand steps, and where it stops depends on rounding.

    Args:
        features, labels: of this rank's share of the samples, of which some rank has at least one.
        num_classes: the labels are below.
        C: how little the weights are held back.
        max_iter: conjugate gradients in all; each goes through the samples once.
        tolerance: the largest entry of the gradient of the mean loss with which it is done.

    Returns:
        The same on every rank: a row for each class, its weights and then its bias.
    """
    problem = _Problem(features, labels, C)
    head = problem.x.new_zeros(num_classes, problem.x.shape[1])
    loss = problem.evaluate(head)
    while loss.gradient.abs().max() > tolerance and max_iter > 0:
        step, products = _newton_step(problem, loss, max_iter)
        max_iter -= products
        size, slope = 1.0, (loss.gradient * step).sum()
        while (found := problem.evaluate(head + size * step)).value > loss.value + 1e-4 * size * slope and size > 1e-9:
            size /= 2
        if not found.value < loss.value:
            break  # what is left is rounding
        head, loss = head + size * step, found
    return problem.in_raw_features(head)


class _Loss(NamedTuple):
    """At a head: the mean loss and its gradient over all ranks, and the probabilities of this rank's samples."""

    value: Tensor
    gradient: Tensor
    probabilities: Tensor


class _Problem:
    """The loss in whitened features: around their mean, uncorrelated, and of like curvature with the regulariser.

    A change of coordinates does not change the solution, only how fast it is found.
    """

    def __init__(self, features: Tensor, labels: Tensor, C: float) -> None:
        raw = with_ones(features)[:, :-1]
        self.labels, self.count = labels[:, None], sum_over_ranks(raw.new_tensor(float(len(raw)))).item()
        self._mean = sum_over_ranks(raw.sum(0)) / self.count
        centred = raw - self._mean
        variances, axes = torch.linalg.eigh(sum_over_ranks(centred.T @ centred) / self.count)
        if group_rank() > 0:  # another processor might turn an axis round
            variances, axes = torch.zeros_like(variances), torch.zeros_like(axes)
        variances, axes = sum_over_ranks(variances), sum_over_ranks(axes.contiguous())
        curvature = variances.clamp(min=0) + 1 / (self.count * C)
        self._basis = axes * curvature.rsqrt()
        self.x = with_ones(centred @ self._basis)
        self._penalty = torch.cat([1 / (C * curvature), curvature.new_zeros(1)])  # of a squared weight, and of the bias

    def evaluate(self, head: Tensor) -> _Loss:
        beat()
        logs = (self.x @ head.T).log_softmax(1)
        probabilities = logs.exp()
        residuals = probabilities.scatter_add(1, self.labels, -torch.ones_like(self.labels, dtype=logs.dtype))
        sums = sum_over_ranks(torch.cat([-logs.gather(1, self.labels).sum()[None], (residuals.T @ self.x).flatten()]))
        value = (sums[0] + (self._penalty * head.square()).sum() / 2) / self.count
        return _Loss(value, (sums[1:].view_as(head) + self._penalty * head) / self.count, probabilities)

    def hessian_product(self, probabilities: Tensor, vector: Tensor) -> Tensor:
        beat()
        scores = self.x @ vector.T
        change = probabilities * (scores - (probabilities * scores).sum(dim=1, keepdim=True))
        return (sum_over_ranks(change.T @ self.x) + self._penalty * vector) / self.count

    def hessian_diagonal(self, probabilities: Tensor) -> Tensor:
        own = sum_over_ranks((probabilities * (1 - probabilities)).T @ self.x.square())
        return (own + self._penalty) / self.count

    def in_raw_features(self, head: Tensor) -> Tensor:
        """The same classifier of features as they were given."""
        weights = head[:, :-1] @ self._basis.T
        return torch.cat([weights, (head[:, -1] - weights @ self._mean)[:, None]], dim=1)


def _newton_step(problem: _Problem, loss: _Loss, most: int) -> tuple[Tensor, int]:
    """About minus the inverse Hessian times the gradient, more exactly near the solution; and the products it took."""
    scale = problem.hessian_diagonal(loss.probabilities).clamp_(min=1e-12)
    step, rest = torch.zeros_like(loss.gradient), -loss.gradient
    direction = scaled = rest / scale
    goal = rest.norm() * rest.norm().sqrt().clamp(max=0.1)
    for products in range(1, most + 1):
        product = problem.hessian_product(loss.probabilities, direction)
        before = (rest * scaled).sum()
        length = before / (direction * product).sum()
        step, rest = step + length * direction, rest - length * product
        if rest.norm() <= goal or products == _CONJUGATE_GRADIENTS:
            break
        scaled = rest / scale
        direction = scaled + (rest * scaled).sum() / before * direction
    return step, products


def with_ones(features: Float[Tensor, "n width"]) -> Float[Tensor, "n width_and_1"]:
    """Features as the head takes them: in float64 (fp32 where a device has no more), and a one for the bias."""
    dtype = torch.float32 if features.device.type == "mps" else torch.float64
    return torch.cat([features.to(dtype), features.new_ones(len(features), 1, dtype=dtype)], dim=1)


def choose_strength(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The C with the best score, by the search of the CLIP paper: a coarse grid, then ever finer around its peak.

    Args:
        score: of a C, such as the accuracy on a validation split. Where scores are equal, the smaller C is better.

    Returns:
        That C, and the score of every C that was tried.
    """
    scores: dict[float, float] = {}

    def best(candidates: range) -> int:
        for place in candidates:
            if STRENGTHS[place] not in scores:
                scores[STRENGTHS[place]] = score(STRENGTHS[place])
        return max(candidates, key=lambda place: (scores[STRENGTHS[place]], -place))

    step = _FIRST_STEP
    peak = best(range(0, len(STRENGTHS), step))
    while step > 1:
        step //= 2
        peak = best(range(max(peak - step, peak % step), min(peak + step, len(STRENGTHS) - 1) + 1, step))
    return STRENGTHS[peak], dict(sorted(scores.items()))


def validation_split(labels: Int64[np.ndarray, " n"], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Cut a set into training and validation samples, the same ones each time, with every class in the same shares.

    Args:
        share: of each class that is for validation, rounded down.

    Returns:
        The samples of both, in their order.
    """
    draws = keyed_uniforms(VALIDATION_SPLIT, np.arange(len(labels)), count=1)[:, 0]
    order = np.lexsort((draws, labels))
    counts = np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    for_validation = order[place < np.floor(share * counts[labels[order]])]
    return np.setdiff1d(np.arange(len(labels)), for_validation), np.sort(for_validation)
