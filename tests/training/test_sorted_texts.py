"""Micro-batches of texts of similar length: the same step, with less padding."""

from typing import Any

import numpy as np
import torch
from torch.testing import assert_close

from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder
from clip_train.models.text_lengths import TokenIds
from clip_train.training.cached_gradients import cached_backward
from clip_train.training.sorted_texts import sort_texts
from tests.models.test_dual_encoder import TINY, random_batch

LENGTHS = np.array([3, 13, 5, 12, 2, 14, 4, 11])


def texts_of_lengths(ids: torch.Tensor) -> TokenIds:
    """With the end token where a text ends, and nothing after it."""
    end = int(ids.max())
    ids = ids.clamp(max=end - 1)
    for row, length in zip(ids, LENGTHS):
        row[length - 1], row[length:] = end, 0
    return TokenIds(ids, LENGTHS)


def test_the_step_is_that_of_the_whole_batch_with_less_padding():
    torch.manual_seed(0)
    model = create_dual_encoder(**{**TINY, "text": {**TINY["text"], "length_multiple": 4}}).double()
    pixels, ids = random_batch(len(LENGTHS))
    inputs = pixels.double() / 255, texts_of_lengths(ids)
    expected = contrastive_loss(*model(*inputs), **model.logit_parameters())
    expected.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    tokens = []
    model.text.trunk.register_forward_pre_hook(
        lambda _, args, named: tokens.append(named["input_ids"].numel()), with_kwargs=True
    )
    counts = []
    ways: list[Any] = [(inputs, contrastive_loss), sort_texts(inputs, contrastive_loss)]
    for taken, loss in ways:
        model.zero_grad()
        tokens.clear()
        value = cached_backward(
            model,
            loss,
            model.logit_parameters(),
            taken,
            micro_batch_size=2,
            backward=lambda scalar, last: scalar.backward(),
        )
        counts.append(sum(tokens))
        assert_close(value, expected.detach(), rtol=1e-12, atol=0)
        assert_close([parameter.grad for parameter in model.parameters()], gradients, rtol=0, atol=1e-12)
    # Two texts at a time, as long as the longer one is rounded up; all but the last two of them twice.
    assert counts == [2 * (2 * (16 + 12 + 16) + 12), 2 * (2 * (4 + 8 + 12) + 16)]


def test_what_is_no_image_and_text_of_known_length_stays_as_it_is():
    pixels, ids = random_batch(4)
    for inputs in ((pixels, ids), (pixels,), (pixels, texts_of_lengths(ids[:1].repeat(8, 1)), ids)):
        found, loss = sort_texts(inputs, contrastive_loss)
        assert found is inputs and loss is contrastive_loss
