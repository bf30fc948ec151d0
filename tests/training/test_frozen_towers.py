"""Micro-batches with a frozen tower: the same gradients, and one encoding of each by that tower."""

import pytest
import torch

from clip_train.losses import contrastive_loss, sigmoid_loss
from clip_train.models.adaptation import adapt
from clip_train.training.cached_gradients import cached_backward
from clip_train.training.frozen_towers import encoding_once
from tests.models.adapted import ADAPTER, LIT, LORA, batch_for, build

PAIRS, MICRO_BATCH = 10, 4


def gradients(model) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("settings", "image_encodings", "text_encodings"),
    [
        (LIT, 3, 5),
        ({**LIT, "lock": "text"}, 5, 3),
        ({**LIT, "unlocked_groups": 1}, 5, 5),
        (ADAPTER, 3, 3),
        (LORA, 5, 5),
        ({**LORA, "towers": ["text"]}, 3, 5),
    ],
    ids=["lit", "lit-text", "lit-unlocked", "adapter", "lora", "lora-text"],
)
def test_gradients_and_encodings(settings, image_encodings, text_encodings):
    model = adapt(build("clip"), settings).train()
    batch = batch_for(build("clip"), "clip", PAIRS)
    expected_loss = contrastive_loss(*model(*batch), **model.logit_parameters())
    expected_loss.backward()
    expected = gradients(model)
    model.zero_grad()
    calls = {"vision": 0, "text": 0}
    for tower in calls:

        def count(*_, tower=tower) -> None:
            calls[tower] += 1

        model.get_submodule(f"{tower}.trunk").register_forward_hook(count)
    loss = cached_backward(
        encoding_once(model),
        contrastive_loss,
        model.logit_parameters(),
        batch,
        micro_batch_size=MICRO_BATCH,
        backward=lambda scalar, last: scalar.backward(),
    )
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * (gradient.norm() + 1e-2), name
    assert calls == {"vision": image_encodings, "text": text_encodings}
    assert not {"forward"} & (vars(model.vision).keys() | vars(model.text).keys())


@pytest.mark.parametrize("train_logit_scale", [False, True])
def test_temperature_and_bias_of_the_sigmoid_loss(train_logit_scale):
    model = adapt(build("siglip"), {**ADAPTER, "train_logit_scale": train_logit_scale}).train()
    batch = batch_for(build("siglip"), "siglip", PAIRS)
    cached_backward(
        encoding_once(model),
        sigmoid_loss,
        model.logit_parameters(),
        batch,
        micro_batch_size=MICRO_BATCH,
        backward=lambda scalar, last: scalar.backward(),
    )
    found = gradients(model)
    assert ({"logit_scale", "logit_bias"} <= found.keys()) == train_logit_scale
    model.zero_grad()
    sigmoid_loss(*model(*batch), **model.logit_parameters()).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_another_batch_is_encoded_anew():
    model = adapt(build("clip"), LIT).train()
    first, second = batch_for(build("clip"), "clip", 2), batch_for(build("clip"), "clip", 4)
    encode = encoding_once(model)
    assert encode(*first)[0].equal(model(*first)[0])
    other = (second[0][2:], second[1][2:])
    assert encode(*other)[0].equal(model(*other)[0])
    assert encode(*first)[0].equal(model(*first)[0])
