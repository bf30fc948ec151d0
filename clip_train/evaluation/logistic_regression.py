"""Logistic regression on features, and the strength of its regularisation: the linear probe of the CLIP paper."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clip_train.data.keyed_random import VALIDATION_SPLIT, keyed_uniforms
from clip_train.distributed import sum_over_ranks
from clip_train.heartbeat import beat

# Radford et al. (2021), A.3: 10^-6 to 10^6 in eighths of a decade, approached from every second decade.
STRENGTHS = tuple(10.0 ** (eighth / 8) for eighth in range(-48, 49))
_FIRST_STEP = 16
_ROWS = 16384  # whose scores are held at a time


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
    """Multinomial logistic regression by L-BFGS over all samples of all ranks at once, in float64.

    It minimises what scikit-learn's LogisticRegression does: the sum of cross-entropies + |W|^2 / (2 C), with a bias
    that is not regularised. Where a linear probe trained by steps depends on a learning rate and an order, this has one
    solution, the same with any number of ranks.

    Args:
        features, labels: of this rank's share of the samples, of which some rank has at least one.
        num_classes: the labels are below.
        C: how little the weights are held back.
        max_iter: of L-BFGS.
        tolerance: the largest entry of the gradient of the mean loss with which it is done, in coordinates in which
            the features are uncorrelated and of variance 1.

    Returns:
        The same on every rank: a row for each class, its weights and then its bias.
    """
    exact = with_ones(features)[:, :-1]
    count = sum_over_ranks(exact.new_tensor(float(len(exact)))).item()
    mean, basis, penalty = _preconditioned(exact, count, C)
    x = with_ones((exact - mean) @ basis)
    head = x.new_zeros(num_classes, x.shape[1])

    def loss_and_gradient() -> Tensor:
        beat()
        sums = sum_over_ranks(_sums(x, labels, head))
        head.grad = (sums[1:].view_as(head) + penalty * head) / count
        return (sums[0] + (penalty * head.square()).sum() / 2) / count

    optimizer = torch.optim.LBFGS(
        [head],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        tolerance_grad=tolerance,
        tolerance_change=1e-15,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(loss_and_gradient)  # pyright: ignore[reportArgumentType]
    weights = head[:, :-1] @ basis.T
    return torch.cat([weights, (head[:, -1] - weights @ mean)[:, None]], dim=1)


def _preconditioned(x: Float[Tensor, "n width"], count: float, C: float) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates in which the same problem is easy: features around their mean, uncorrelated, of like curvature.

    Without, L-BFGS needs more than its thousand steps on features of a trunk, and where it stops depends on rounding.

    Returns:
        The mean that is subtracted, the matrix that is multiplied with, and what the squares of weights and bias cost.
    """
    mean = sum_over_ranks(x.sum(0)) / count
    centred = x - mean
    variances, axes = torch.linalg.eigh(sum_over_ranks(centred.T @ centred) / count)
    curvature = variances.clamp(min=0) + 1 / (count * C)
    return mean, axes * curvature.rsqrt(), torch.cat([1 / (C * curvature), curvature.new_zeros(1)])


def with_ones(features: Float[Tensor, "n width"]) -> Float[Tensor, "n width_and_1"]:
    """Features as the head takes them: in float64 (fp32 where a device has no more), and a one for the bias."""
    dtype = torch.float32 if features.device.type == "mps" else torch.float64
    return torch.cat([features.to(dtype), features.new_ones(len(features), 1, dtype=dtype)], dim=1)


def _sums(x: Tensor, labels: Tensor, head: Tensor) -> Float[Tensor, " one_and_weights"]:
    """Over this rank's samples: of the cross-entropies, and of their gradients."""
    sums = x.new_zeros(1 + head.numel())
    gradient = sums[1:].view_as(head)
    for start in range(0, len(x), _ROWS):
        rows, own = x[start : start + _ROWS], labels[start : start + _ROWS, None]
        logs = (rows @ head.T).log_softmax(1)
        sums[0] -= logs.gather(1, own).sum()
        gradient.addmm_(logs.exp_().scatter_add_(1, own, -torch.ones_like(own, dtype=x.dtype)).T, rows)
    return sums


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
