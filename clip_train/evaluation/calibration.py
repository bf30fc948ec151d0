"""Whether a classifier is right as often as it says (Guo et al., 2017, arXiv:1706.04599)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

NUM_BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Confidence and accuracy in bins of equal width; both are 0 in a bin without pictures.

    Attributes:
        ece: expected calibration error: the mean over pictures of the gap between the two in their bin.
        count: pictures in each bin.
    """

    ece: float
    count: Int64[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]


def calibrate(confidence: Float[Tensor, " n"], right: Bool[Tensor, " n"], num_bins: int = NUM_BINS) -> Calibration:
    """Compare how sure a classifier was of its answers with how many of them were right.

    Args:
        confidence: the highest probability of each picture, in [0, 1].
        right: whether that class was the picture's own.
        num_bins: bin m holds confidences in (m / num_bins, (m + 1) / num_bins].
    """
    confidence = confidence.double()
    bins = (confidence * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
    count = torch.bincount(bins, minlength=num_bins)
    sums = [torch.bincount(bins, values, minlength=num_bins) for values in (confidence, right.double())]
    means = [total / count.clamp(min=1) for total in sums]
    ece = (count * (means[0] - means[1]).abs()).sum() / count.sum()
    return Calibration(ece.item(), count, *means)
