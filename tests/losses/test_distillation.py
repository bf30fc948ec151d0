"""The distillation loss on one process."""

import open_clip
import pytest
import torch
from torch import Tensor

from clip_train.losses import distillation_loss
from tests.losses.references import KINDS, distillation, unit_vectors
from tests.losses.test_contrastive import LargestTensor


def features(count: int, kind: str = "random", dtype=torch.float64) -> list[Tensor]:
    """Of a student of 5 numbers and a teacher of 9."""
    return [x.to(dtype) for x in (*unit_vectors(kind, count, 5), *unit_vectors(kind, count, 9, seed=1))]


def scalar(value: float, dtype=torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def test_gradcheck():
    image, text, *teacher = features(6)
    leaves = [image.requires_grad_(), text.requires_grad_(), scalar(5.0).requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, y, s: distillation_loss(x, y, *teacher, s, scalar(8.0)), leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_open_clip(kind):
    image, text, *teacher = features(40, kind, torch.float32)
    leaves = [image.requires_grad_(), text.requires_grad_(), scalar(14.3, torch.float32).requires_grad_()]
    scale = scalar(50.0, torch.float32)
    found = distillation_loss(*leaves[:2], *teacher, leaves[2], scale)
    both = open_clip.loss.DistillClipLoss()
    expected = both(*leaves, *teacher, scale, output_dict=True)["distill_loss"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-5


def test_a_student_that_agrees_has_no_gradient_and_the_loss_of_the_entropy():
    image, text = unit_vectors("random", 30, 5)
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_(), scalar(9.0).requires_grad_()]
    loss = distillation_loss(*leaves[:2], image, text, leaves[2], scalar(9.0))
    assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(loss, leaves))
    worse = distillation_loss(text, image.flip(0), image, text, scalar(9.0), scalar(9.0))
    assert loss < worse


def test_rounded_products_are_nearly_as_exact():
    inputs = [*features(600, "matched", torch.float32), scalar(14.3, torch.float32), scalar(50.0, torch.float32)]
    exact, rounded = (distillation_loss(*inputs, matmul_dtype=dtype) for dtype in (None, torch.bfloat16))
    assert rounded != exact
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)


def test_nothing_larger_than_a_tile_is_held():
    image, text, *teacher = features(3000, dtype=torch.float32)
    leaves = [image.requires_grad_(), text.requires_grad_(), scalar(14.3, torch.float32).requires_grad_()]
    with LargestTensor() as largest:
        distillation_loss(*leaves[:2], *teacher, leaves[2], scalar(50.0, torch.float32)).backward()
    assert largest.numel == 384 * 768


def test_locked_inputs_have_no_gradient():
    for locked in range(3):
        image, text, *teacher = features(12)
        leaves = [x.requires_grad_(place != locked) for place, x in enumerate((image, text, scalar(5.0)))]
        distillation_loss(*leaves[:2], *teacher, leaves[2], scalar(8.0)).backward()
        free = [x.detach().clone().requires_grad_() for x in leaves]
        expected = torch.autograd.grad(distillation(*free[:2], *teacher, free[2], scalar(8.0)), free)
        for place, (leaf, grad) in enumerate(zip(leaves, expected)):
            assert (leaf.grad is None) == (place == locked)
            assert leaf.grad is None or torch.allclose(leaf.grad, grad, atol=1e-12)
