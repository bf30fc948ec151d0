"""The losses as their papers define them, on whole batches in float64."""

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return F.softplus(-signs * logits, threshold=50).sum() / len(image)


def distillation(
    image: Tensor, text: Tensor, scale: Tensor, teacher_image: Tensor, teacher_text: Tensor, teacher_scale: Tensor
) -> Tensor:
    logits, targets = scale * image @ text.T, teacher_scale * teacher_image @ teacher_text.T
    by_image = F.cross_entropy(logits, targets.softmax(1))
    return (by_image + F.cross_entropy(logits.T, targets.T.softmax(1))) / 2


def unit_vectors(kind: str, count: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Image and text features (count, dim) of a kind, float64.

    `random`; `matched`: pairs alike; `duplicates`: every row several times; `orthogonal`: axes, so that most cosines
    are exactly 0; `collapsed`: all images one point, the texts its opposite but for one that matches it.
    """
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, count, dim, dtype=torch.float64, generator=generator)
    if kind == "matched":
        text = image + 0.3 * text
    elif kind == "duplicates":
        image, text = image[torch.arange(count) // 3], text[torch.arange(count) // 5]
    elif kind == "orthogonal":
        image = text = torch.eye(dim, dtype=torch.float64)[torch.arange(count) % dim]
    elif kind == "collapsed":
        image = image[:1].expand(count, dim)
        text = -image.clone()
        text[0] = image[0]
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


KINDS = ("random", "matched", "duplicates", "orthogonal", "collapsed")
