"""Classification of a labelled set: by the names of its classes, or by any other classifier of pictures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.data.class_names import ClassNames
from clip_train.data.eval_batches import EvalBatches
from clip_train.data.tokenizer_choice import CaptionTokenizer
from clip_train.distributed import agreed, gather_parts, own_part
from clip_train.evaluation.classification import Classify
from clip_train.heartbeat import beat
from clip_train.models import DualEncoder
from clip_train.models.linear_probe import LinearProbe
from clip_train.models.prompt_learner import PromptLearner, cosines


@torch.no_grad()
def class_embeddings(
    encode_text: Callable[[Tensor], Tensor],
    classes: ClassNames,
    tokenizer: CaptionTokenizer,
    *,
    batch_size: int,
) -> Float[Tensor, "classes embed"]:
    """A unit vector for each class, on every rank: the mean of its captions' unit vectors, normalised again.

    Every rank encodes a contiguous share of the classes.

    Args:
        encode_text: token ids, on the host, to unit vectors.
        batch_size: about how many captions at a time, but all of a class.
    """
    own = [classes.captions(label) for label in own_part(len(classes))]
    step = max(1, batch_size // max(map(len, own), default=1))
    means = []
    with agreed(batch_size):
        for start in range(0, len(own), step):
            beat()
            some = own[start : start + step]
            ids = tokenizer([caption for captions in some for caption in captions])
            encoded = encode_text(torch.from_numpy(ids)).float().split([len(captions) for captions in some])
            means.append(F.normalize(torch.stack([captions.mean(0) for captions in encoded]), dim=-1))
        if not means:  # more ranks than classes: take part with no rows, of the others' width
            ids = torch.from_numpy(tokenizer(classes.captions(0)[:1]))
            means.append(encode_text(ids).float()[:0])
    return gather_parts(torch.cat(means), len(classes))


@torch.no_grad()
def make_classifier(model: DualEncoder, batches: EvalBatches, batch_size: int) -> Classify:
    """Pictures to scores of the set's classes: by what was learned of classes, else cosines to the class embeddings."""
    classes = set_classes(batches)
    if isinstance(model, LinearProbe | PromptLearner):
        return model.make_classifier(classes)
    weights = class_embeddings(model.encode_text, classes, batches.tokenizer, batch_size=batch_size)

    return lambda pixels: cosines(model.encode_image(pixels), weights)


@torch.no_grad()
def make_probability_classifier(model: DualEncoder, batches: EvalBatches, batch_size: int) -> Classify:
    """Pictures to probabilities of the set's classes: the mean of what a softmax makes of each template's cosines.

    The first caption of every class makes one classifier, the second another, and so on: the ensemble in probability
    space that CLIP's paper (Radford et al., 2021, section 3.1.4) compares with the one over embeddings.

    Raises:
        ConfigError: some classes have more captions than others.
    """
    scale = model.logit_scale.exp()
    members = [
        class_embeddings(model.encode_text, classes, batches.tokenizer, batch_size=batch_size)
        for classes in set_classes(batches).one_caption_each()
    ]

    def probabilities(pixels: Tensor) -> Tensor:
        images = model.encode_image(pixels)
        total = torch.zeros(len(images), len(members[0]), device=images.device)
        for weights in members:  # one at a time, as all would take much room
            total += (scale * cosines(images, weights)).softmax(dim=1)
        return total / len(members)

    return probabilities


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
