"""The cached step against the plain one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clip_train.errors import ConfigError
from clip_train.losses import contrastive_loss, sigmoid_loss
from clip_train.models import DualEncoder, create_dual_encoder
from clip_train.training.cached_gradients import cached_backward, refuse_batch_norm
from tests.models.test_dual_encoder import TINY, random_batch

BATCH = 12
LOSSES = {"contrastive": contrastive_loss, "sigmoid": sigmoid_loss}


def tiny_model(loss: str, grad_checkpointing: str = "none", **vision: float) -> DualEncoder:
    torch.manual_seed(0)
    config = {**TINY, "grad_checkpointing": grad_checkpointing}
    config["vision"] = {**TINY["vision"], "options": {**TINY["vision"]["options"], **vision}}
    if loss == "sigmoid":
        config["init_logit_bias"] = -2.0
    return create_dual_encoder(**config)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(model: DualEncoder, loss: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    value = loss(*model(*random_batch(BATCH)), **model.logit_parameters())
    value.backward()
    return value.detach(), gradients(model)


def cached(model: DualEncoder, loss: Callable[..., Tensor], size: int) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    value = cached_backward(
        model,
        loss,
        model.logit_parameters(),
        random_batch(BATCH),
        micro_batch_size=size,
        backward=lambda scalar, last: scalar.backward(),
    )
    return value, gradients(model)


@pytest.mark.parametrize("grad_checkpointing", ["none", "blocks", "selective"])
@pytest.mark.parametrize("size", [1, 3, 5, 12, 100])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_gradients_equal_those_of_the_plain_step(loss, size, grad_checkpointing):
    model = tiny_model(loss, grad_checkpointing)
    expected_value, expected = plain(model, LOSSES[loss])
    value, found = cached(model, LOSSES[loss], size)
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-6)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        # Key biases have no influence: their gradient is rounding alone, small beside the whole. Micro-batches have
        # texts of other lengths, whose sums are rounded otherwise.
        assert (found[name] - grad).norm() <= 4e-6 * grad.norm() + 1e-8 * total, name


def test_gradients_are_to_the_bit_those_of_one_micro_batch():
    model = tiny_model("contrastive")
    expected_value, expected = plain(model, contrastive_loss)
    value, found = cached(model, contrastive_loss, BATCH)
    assert torch.equal(value, expected_value)
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_one_loss_and_second_forwards_with_the_same_noise():
    model = tiny_model("contrastive", drop_rate=0.3, patch_drop_rate=0.5, drop_path_rate=0.2).train()
    features, losses, lasts = [], [], []

    def encode(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        features.append(model(*inputs))
        return features[-1]

    def loss(*inputs: Tensor, **scalars: Tensor) -> Tensor:
        losses.append(1)
        return contrastive_loss(*inputs, **scalars)

    def backward(scalar: Tensor, last: bool) -> None:
        lasts.append(last)
        scalar.backward()

    cached_backward(encode, loss, model.logit_parameters(), random_batch(BATCH), micro_batch_size=4, backward=backward)
    assert (len(losses), lasts) == (1, [False, False, True])
    first, again = features[:2], features[3:][::-1]  # the last micro-batch is encoded once
    assert len(again) == 2
    for one, other in zip(first, again):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert not torch.equal(first[0][0], model(*(x[:4] for x in random_batch(BATCH)))[0])  # there was noise
    assert not first[0][0].requires_grad and again[0][0].requires_grad


def test_under_autocast():
    model = tiny_model("contrastive")
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        _, expected = plain(model, contrastive_loss)
        _, found = cached(model, contrastive_loss, 4)
    assert found["logit_scale"].item() == pytest.approx(expected["logit_scale"].item(), rel=0.01)
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 0.02 * grad.norm() + 2e-3, name  # bf16 rounds other sums otherwise


def test_a_loss_that_ignores_the_temperature():
    model = tiny_model("contrastive")
    _, found = cached(model, lambda image, text, **_: (image * text).sum(), 4)
    assert found["logit_scale"].item() == 0


def test_a_locked_tower():
    model = tiny_model("contrastive")
    model.vision.requires_grad_(False)
    _, expected = plain(model, contrastive_loss)
    _, found = cached(model, contrastive_loss, 4)
    assert found.keys() == expected.keys()
    assert not any(name.startswith("vision") for name in found)


def test_outputs_beside_the_features():
    class WithSampleLosses(nn.Module):
        """A loss of each sample, and a count that has no gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.towers = tiny_model("contrastive")

        def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            image, text = self.towers(pixels, ids)
            return image, text, (image * text).sum(1).exp(), (ids != 0).sum(1)

    def loss(image: Tensor, text: Tensor, own: Tensor, counts: Tensor, logit_scale: Tensor) -> Tensor:
        assert not counts.requires_grad
        return contrastive_loss(image, text, logit_scale) + 2 * own.sum() / counts.sum()

    model = WithSampleLosses()
    values, found = [], []
    for size in (4, BATCH):
        model.zero_grad()
        arguments = (model, loss, model.towers.logit_parameters(), random_batch(BATCH))
        values.append(cached_backward(*arguments, micro_batch_size=size, backward=lambda part, last: part.backward()))
        found.append(gradients(model))
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-4, atol=1e-6)


def test_batch_norm_is_refused():
    with pytest.raises(ConfigError, match=r"1 is a batch norm.*micro_batch_size=null"):
        refuse_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    refuse_batch_norm(tiny_model("contrastive"))
