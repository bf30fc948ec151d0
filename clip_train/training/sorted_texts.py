"""Texts of similar length in one micro-batch, which is encoded as long as its longest: little of it is padding then."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from clip_train.models.text_lengths import TokenIds


def sort_texts(inputs: tuple[Any, ...], loss: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Callable[..., Tensor]]:
    """The same inputs with texts in the order of their lengths, and a loss that gets their features in their own order.

    The towers of a dual encoder know nothing of each other, so that a text need not be encoded beside its image.

    Args:
        inputs: of the model. Unless they are images and texts whose lengths are known, all stays as it is.
        loss: of both features.
    """
    if len(inputs) != 2 or not isinstance(inputs[1], TokenIds):
        return inputs, loss
    images, texts = inputs
    order = np.argsort(texts.lengths, kind="stable")
    back = texts.rows(np.argsort(order))

    def loss_in_order(image_features: Tensor, text_features: Tensor, **scalars: Tensor) -> Tensor:
        return loss(image_features, text_features[back], **scalars)

    return (images, texts.take(order)), loss_in_order
