"""How well a labelled set is classified, exactly, whatever the number of ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clip_train.data.eval_batches import EvalBatches, rank_slices
from clip_train.data.loader import make_loader
from clip_train.distributed import agreed, gather_parts, group_rank, group_size
from clip_train.errors import DataError
from clip_train.evaluation.progress import told

MOST_CONFUSED = 2000  # classes that a confusion matrix is drawn and written of
METRICS = ("top1", "top5", "mean_per_class_recall")

Classify = Callable[[Tensor], Tensor]


class Predictions(NamedTuple):
    """What was said of each picture of a set, on every rank, in the set's order.

    Attributes:
        label: its class.
        predicted: the class with the highest score; of several, the first.
        rank: how many classes come before its own.
        confidence: the highest probability; NaN if scores are not numbers.
    """

    label: Int64[Tensor, " n"]
    predicted: Int64[Tensor, " n"]
    rank: Int64[Tensor, " n"]
    confidence: Float[Tensor, " n"]


@torch.no_grad()
def classify_set(
    classify: Classify,
    batches: EvalBatches,
    *,
    batch_size: int,
    num_workers: int,
    autocast: AbstractContextManager,
    device: torch.device,
    logit_scale: float | None = 1.0,
) -> Predictions:
    """Classify a labelled set, each picture once, every rank its share.

    Args:
        classify: pictures to scores of the classes.
        batches: with labels.
        batch_size: pictures per forward pass on a rank.
        num_workers: loader processes.
        autocast: the precision to compute in.
        device: where the classifier is.
        logit_scale: what scores are multiplied by before a softmax makes probabilities of them; None if that is what
            they are.

    Raises:
        DataError: on every rank, if a sample cannot be used.
    """
    whole = [torch.empty(0, 3, dtype=torch.int64, device=device)]
    confidences = [torch.empty(0, device=device)]
    slices = rank_slices(len(batches), group_rank(), group_size(), batch_size)
    with agreed(batch_size), autocast:
        for batch in told(make_loader(batches, slices, num_workers), len(batches)):
            if batch["error"]:
                raise DataError(batch["error"])
            if len(batch["image"]):
                scores, labels = classify(batch["image"].to(device)).float(), batch["label"].to(device)
                whole.append(torch.stack([labels, scores.argmax(1), rank_of_label(scores, labels)], dim=1))
                probabilities = scores if logit_scale is None else (logit_scale * scores).softmax(1)
                confidences.append(probabilities.amax(1))
    label, predicted, rank = gather_parts(torch.cat(whole), len(batches)).cpu().unbind(1)
    return Predictions(label, predicted, rank, gather_parts(torch.cat(confidences), len(batches)).cpu())


def rank_of_label(scores: Float[Tensor, "b classes"], labels: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
    """For each picture, how many classes come before its own."""
    own = scores.gather(1, labels[:, None])
    column = torch.arange(scores.shape[1], device=scores.device)
    # Said by what comes after, so that a score that is not a number ranks last.
    after = (scores < own) | ((scores == own) & (column >= labels[:, None]))
    return (~after).sum(dim=1)


def classification_metrics(predictions: Predictions, num_classes: int) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class_recall`. A class without pictures does not count in the mean over classes."""
    there_are, right = class_counts(predictions, num_classes)
    present = there_are > 0
    values = (
        right.sum() / there_are.sum(),
        (predictions.rank < 5).double().mean(),
        (right[present] / there_are[present]).mean(),
    )
    return dict(zip(METRICS, (value.item() for value in values)))


def class_counts(
    predictions: Predictions, num_classes: int, top: int = 1
) -> tuple[Float[Tensor, " classes"], Float[Tensor, " classes"]]:
    """Of each class, how many pictures there are, and of how many it is among the best `top`."""
    there_are = torch.bincount(predictions.label, minlength=num_classes).double()
    among = torch.bincount(predictions.label[predictions.rank < top], minlength=num_classes).double()
    return there_are, among


def confusion_matrix(predictions: Predictions, num_classes: int) -> Int64[Tensor, "classes classes"]:
    """How many pictures of the class of the row were taken for the class of the column."""
    cells = predictions.label * num_classes + predictions.predicted
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)
