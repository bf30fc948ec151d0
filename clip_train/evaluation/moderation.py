"""Content moderation by text: images that are nearer to a category's prompts than a threshold learned from examples."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Threshold(NamedTuple):
    """Of a category: flag what scores at least `value`, and what that gave on the images it was calibrated on.

    Attributes:
        value: infinite where nothing is to be flagged.
        precision: of the flagged images, how many belong to the category; NaN if none is flagged.
        recall: of the category's images, how many are flagged; NaN if there are none.
        f1: harmonic mean of the two.
    """

    value: float
    precision: float
    recall: float
    f1: float


def calibrate_thresholds(
    scores: Float[Tensor, "images categories"],
    belongs: Bool[Tensor, "images categories"],
    min_precision: float | None = None,
) -> list[Threshold]:
    """For each category the threshold with the best F1, or, with `min_precision`, the one with the best recall.

    A threshold lies halfway between two scores that occur, so that rounding cannot move an image across it. Of equally
    good ones the highest is taken.

    Args:
        scores: such as cosines of images to the category's prompts, on a labelled set.
        belongs: whether an image is of a category, of which it may have several or none.
        min_precision: in (0, 1]. A category that cannot reach it flags nothing.
    """
    return [_calibrate(*column, min_precision) for column in zip(scores.double().T, belongs.T, strict=True)]


def moderation_report(
    scores: Float[Tensor, "images categories"], belongs: Bool[Tensor, "images categories"], values: Sequence[float]
) -> list[Threshold]:
    """Precision, recall and F1 of each category with thresholds from elsewhere, as `calibrate_thresholds` has them."""
    return [
        _measured(value, int(own[flagged].sum()), int(flagged.sum()), int(own.sum()))
        for value, own, flagged in zip(values, belongs.T, flag_images(scores, values).T, strict=True)
    ]


def flag_images(
    scores: Float[Tensor, "images categories"], values: Sequence[float]
) -> Bool[Tensor, "images categories"]:
    """Which images are flagged for which categories."""
    return scores.double() >= torch.tensor(values, dtype=torch.float64, device=scores.device)


def _calibrate(scores: Float[Tensor, " n"], own: Bool[Tensor, " n"], min_precision: float | None) -> Threshold:
    ordered, order = scores.sort(descending=True, stable=True)
    right = own[order].cumsum(0).double()
    flagged = torch.arange(1, len(ordered) + 1, dtype=torch.float64, device=scores.device)
    last_of_equal = torch.ones_like(ordered, dtype=torch.bool)
    last_of_equal[:-1] = ordered[:-1] > ordered[1:]
    if min_precision is None:
        merit = 2 * right / (flagged + own.sum())  # F1
        allowed = last_of_equal & (right > 0)
    else:
        merit = right
        allowed = last_of_equal & (right / flagged >= min_precision) & (right > 0)
    if not allowed.any():
        return _measured(float("inf"), 0, 0, int(own.sum()))
    best = int(merit.where(allowed, -1).argmax())
    lower = ordered[best + 1] if best + 1 < len(ordered) else ordered[best]
    value = (ordered[best].item() + lower.item()) / 2
    return _measured(value, int(right[best]), best + 1, int(own.sum()))


def _measured(value: float, right: int, flagged: int, there_are: int) -> Threshold:
    nothing = float("nan")
    f1 = 2 * right / (flagged + there_are) if flagged + there_are else nothing
    return Threshold(value, right / flagged if flagged else nothing, right / there_are if there_are else nothing, f1)
