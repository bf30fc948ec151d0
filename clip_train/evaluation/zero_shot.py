"""Classification of a labelled set: by the names of its classes, or by any other classifier of pictures."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.data.class_names import ClassNames
from clip_train.data.eval_batches import EvalBatches, rank_slices
from clip_train.data.loader import make_loader
from clip_train.data.tokenizer_choice import CaptionTokenizer
from clip_train.distributed import gather_ragged, group_rank, group_size, raise_everywhere, sum_over_ranks
from clip_train.heartbeat import beat
from clip_train.models import DualEncoder
from clip_train.models.linear_probe import LinearProbe
from clip_train.models.prompt_learner import PromptLearner, cosines

METRICS = ("top1", "top5", "mean_per_class_recall")

Classify = Callable[[Tensor], Tensor]


@torch.no_grad()
def class_embeddings(
    encode_text: Callable[[Tensor], Tensor],
    classes: ClassNames,
    tokenizer: CaptionTokenizer,
    *,
    batch_size: int,
    device: torch.device,
) -> Float[Tensor, "classes embed"]:
    """A unit vector for each class, on every rank: the mean over the templates of its captions' unit vectors.

    Every rank encodes a contiguous share of the classes.

    Args:
        encode_text: token ids to unit vectors.
        batch_size: about how many captions at a time, but all of a class.
        device: where the text tower is.
    """
    edges = [len(classes) * rank // group_size() for rank in range(group_size() + 1)]
    own = range(edges[group_rank()], edges[group_rank() + 1])
    per_class = len(classes.templates)
    step = max(1, batch_size // per_class)
    means = []
    for start in range(own.start, own.stop, step):
        beat()
        captions = [caption for label in own[start - own.start :][:step] for caption in classes.captions(label)]
        encoded = encode_text(torch.from_numpy(tokenizer(captions)).to(device)).float()
        means.append(F.normalize(encoded.view(-1, per_class, encoded.shape[1]).mean(1), dim=-1))
    if not means:  # more ranks than classes: take part with no rows, of the others' width
        ids = torch.from_numpy(tokenizer(classes.captions(0)[:1])).to(device)
        means.append(encode_text(ids).float()[:0])
    return gather_ragged(torch.cat(means), [last - first for first, last in pairwise(edges)])


@torch.no_grad()
def make_classifier(model: DualEncoder, batches: EvalBatches, batch_size: int) -> Classify:
    """Pictures to scores of the set's classes: by what was learned of classes, else cosines to the class embeddings."""
    classes = set_classes(batches)
    if isinstance(model, LinearProbe | PromptLearner):
        return model.make_classifier(classes)
    device = model.logit_scale.device
    weights = class_embeddings(model.encode_text, classes, batches.tokenizer, batch_size=batch_size, device=device)

    return lambda pixels: cosines(model.encode_image(pixels), weights)


def set_classes(batches: EvalBatches) -> ClassNames:
    """The class names of a labelled set."""
    (classes,) = batches.reader.classes
    assert classes is not None
    return classes


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def classification_metrics(
    classify: Classify,
    batches: EvalBatches,
    *,
    batch_size: int,
    num_workers: int,
    autocast: AbstractContextManager,
    device: torch.device,
) -> dict[str, float]:
    """Accuracy on a labelled set. Every rank classifies its share of the pictures, each once.

    Where scores are equal, the class that comes first ranks first. A class without pictures does not count in the mean
    over classes.

    Args:
        classify: pictures to scores of the classes.
        batches: with labels.
        batch_size: pictures per forward pass on a rank.
        num_workers: loader processes.
        autocast: the precision to compute in.
        device: where the classifier is.

    Returns:
        `top1`, `top5` and `mean_per_class_recall`, the same on every rank.

    Raises:
        DataError: on every rank, if a sample cannot be used.
    """
    tally, error = _Tally(len(set_classes(batches)), device), ""
    slices = rank_slices(len(batches), group_rank(), group_size(), batch_size)
    with autocast:
        for batch in make_loader(batches, slices, num_workers):
            beat()
            error = error or batch["error"]
            if not error and len(batch["image"]):
                tally.add(classify(batch["image"].to(device)).float(), batch["label"].to(device))
    raise_everywhere(error)
    return tally.metrics()


class _Tally:
    """How many pictures there are of each class, and how many have it among the best 1 and 5."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)

    def add(self, scores: Float[Tensor, "b classes"], labels: Int64[Tensor, " b"]) -> None:
        ranks = rank_of_label(scores, labels)
        for row, counted in zip(self.counts, (torch.ones_like(ranks), ranks < 1, ranks < 5)):
            row.index_add_(0, labels, counted.long())

    def metrics(self) -> dict[str, float]:
        there_are, best, among_five = sum_over_ranks(self.counts).double().cpu()
        total, present = there_are.sum(), there_are > 0
        recall = (best[present] / there_are[present]).mean()
        return dict(zip(METRICS, ((best.sum() / total).item(), (among_five.sum() / total).item(), recall.item())))


def rank_of_label(scores: Float[Tensor, "b classes"], labels: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
    """For each picture, how many classes come before its own."""
    own = scores.gather(1, labels[:, None])
    column = torch.arange(scores.shape[1], device=scores.device)
    # Said by what comes after, so that a score that is not a number ranks last.
    after = (scores < own) | ((scores == own) & (column >= labels[:, None]))
    return (~after).sum(dim=1)
