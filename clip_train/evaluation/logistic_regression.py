"""Logistic regression on features, and the strength of its regularisation: the linear probe of the CLIP paper."""

from collections.abc import Callable, Iterable, Iterator
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
_ROWS = 4096  # that there is a float64 copy of at a time


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
    problem = _Problem(features, labels, num_classes, C)
    loss = problem.evaluate(problem.start)
    while loss.gradient.abs().max() > tolerance and max_iter > 0:
        step, products = _newton_step(problem, loss, max_iter)
        max_iter -= products
        size, slope = 1.0, (loss.gradient * step).sum()
        while (
            found := problem.evaluate(loss.head + size * step)
        ).value > loss.value + 1e-4 * size * slope and size > 1e-9:
            size /= 2
        if not found.value < loss.value:
            break  # what is left is rounding
        loss = found
    return problem.in_raw_features(loss.head)


class _Loss(NamedTuple):
    """At a head: the mean loss and its gradient over all ranks."""

    head: Tensor
    value: Tensor
    gradient: Tensor


class _Problem:
    """The loss in whitened features: around their mean, uncorrelated, and of like curvature with the regulariser.

    A change of coordinates does not change the solution, only how fast it is found. Features stay as they were given:
    only some thousand rows at a time are there in float64, around their mean, and it is heads that are transformed.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, C: float) -> None:
        self._features, self._labels = features, labels[:, None]
        width, like = features.shape[1], with_ones(features[:0])
        self._block = like.new_empty(min(_ROWS, len(features)), width)
        self._mean = like.new_zeros(width)
        self.count = sum_over_ranks(like.new_tensor(float(len(features)))).item()
        self._mean = self._sum((rows.sum(0) for rows, _ in self._rows()), self._mean) / self.count
        squares = self._sum((rows.T @ rows for rows, _ in self._rows()), like.new_empty(width, width))
        variances, axes = torch.linalg.eigh(squares / self.count)
        if group_rank() > 0:  # another processor might turn an axis round
            variances, axes = torch.zeros_like(variances), torch.zeros_like(axes)
        variances, axes = sum_over_ranks(variances), sum_over_ranks(axes.contiguous())
        curvature = variances.clamp(min=0) + 1 / (self.count * C)
        self._basis = axes * curvature.rsqrt()
        self._mean_squares = torch.cat([variances.clamp(min=0) / curvature, curvature.new_ones(1)])
        self._penalty = torch.cat([1 / (C * curvature), curvature.new_zeros(1)])  # of a squared weight, and of the bias
        self.start = like.new_zeros(num_classes, width + 1)

    def evaluate(self, head: Tensor) -> _Loss:
        def sums() -> Iterator[Tensor]:
            for rows, labels in self._rows():
                logs = self._scores(rows, head).log_softmax(1)
                value = -logs.gather(1, labels).sum()[None]
                residuals = logs.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=logs.dtype))
                yield torch.cat([value, _outer(residuals, rows).flatten()])

        found = self._sum(sums(), head.new_empty(1 + head.numel()))
        value = (found[0] + (self._penalty * head.square()).sum() / 2) / self.count
        return _Loss(head, value, (self._whitened(found[1:].view_as(head)) + self._penalty * head) / self.count)

    def hessian_product(self, head: Tensor, vector: Tensor) -> Tensor:
        both = torch.cat([head, vector])

        def products() -> Iterator[Tensor]:
            for rows, _ in self._rows():
                logits, scores = self._scores(rows, both).chunk(2, dim=1)
                probabilities = logits.softmax(1)
                yield _outer(probabilities * (scores - (probabilities * scores).sum(dim=1, keepdim=True)), rows)

        return (self._whitened(self._sum(products(), head)) + self._penalty * vector) / self.count

    def hessian_diagonal(self, head: Tensor) -> Tensor:
        """About that: as if each square of a whitened feature were its mean, which saves whitening all samples."""

        def weights() -> Iterator[Tensor]:
            for rows, _ in self._rows():
                probabilities = self._scores(rows, head).softmax(1)
                yield (probabilities * (1 - probabilities)).sum(0)

        return (self._sum(weights(), head[:, 0])[:, None] * self._mean_squares + self._penalty) / self.count

    def in_raw_features(self, head: Tensor) -> Tensor:
        """The same classifier of features as they were given."""
        weights = head[:, :-1] @ self._basis.T
        return torch.cat([weights, (head[:, -1] - weights @ self._mean)[:, None]], dim=1)

    def _rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features around their mean, until the next come, and labels; some rows at a time."""
        for start in range(0, len(self._features), _ROWS):
            beat()
            part = self._features[start : start + _ROWS]
            yield self._block[: len(part)].copy_(part).sub_(self._mean), self._labels[start : start + _ROWS]

    def _scores(self, rows: Tensor, head: Tensor) -> Tensor:
        return torch.addmm(head[:, -1], rows, self._basis @ head[:, :-1].T)

    def _whitened(self, sums: Tensor) -> Tensor:
        """Sums over centred features, as they would be over whitened ones."""
        return torch.cat([sums[:, :-1] @ self._basis, sums[:, -1:]], dim=1)

    @staticmethod
    def _sum(parts: Iterable[Tensor], like: Tensor) -> Tensor:
        """Over the parts, and over the ranks."""
        total = torch.zeros_like(like)
        for part in parts:
            total += part
        return sum_over_ranks(total)


def _outer(weights: Float[Tensor, "n classes"], rows: Float[Tensor, "n width"]) -> Float[Tensor, "classes width_and_1"]:
    """The sum over samples of each class's weight times the features, and times one for the bias."""
    return torch.cat([weights.T @ rows, weights.sum(0)[:, None]], dim=1)


def _newton_step(problem: _Problem, loss: _Loss, most: int) -> tuple[Tensor, int]:
    """About minus the inverse Hessian times the gradient, more exactly near the solution; and the products it took."""
    scale = problem.hessian_diagonal(loss.head).clamp_(min=1e-12)
    step, rest = torch.zeros_like(loss.gradient), -loss.gradient
    direction = scaled = rest / scale
    goal = rest.norm() * rest.norm().sqrt().clamp(max=0.1)
    for products in range(1, most + 1):
        product = problem.hessian_product(loss.head, direction)
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
