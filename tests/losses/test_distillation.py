"""The distillation loss on one process."""

import open_clip
import pytest
import torch
from torch import Tensor

from clip_train.losses import distillation_loss
from tests.losses.references import KINDS, distillation, unit_vectors
from tests.losses.test_contrastive import LargestTensor

Model = tuple[Tensor, Tensor, Tensor]  # images, texts, scale


def models(count: int, kind: str = "random", dtype=torch.float64) -> tuple[Model, Model]:
    """A student of 5 numbers, which wants gradients, and a teacher of 9."""
    image, text = (x.to(dtype).requires_grad_() for x in unit_vectors(kind, count, 5))
    teacher_image, teacher_text = (x.to(dtype) for x in unit_vectors(kind, count, 9, seed=1))
    scale = torch.tensor(14.3, dtype=dtype, requires_grad=True)
    return (image, text, scale), (teacher_image, teacher_text, torch.tensor(50.0, dtype=dtype))


def test_gradcheck():
    student, (image, text, scale) = models(6)
    assert torch.autograd.gradcheck(lambda x, y, s: distillation_loss(x, y, s, image, text, scale), student)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_open_clip(kind):
    student, teacher = models(40, kind, torch.float32)
    found = distillation_loss(*student, *teacher)
    expected = open_clip.loss.DistillClipLoss()(*student, *teacher, output_dict=True)["distill_loss"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, student), torch.autograd.grad(expected, student)):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-5


def test_a_student_that_agrees_has_no_gradient_and_the_least_loss():
    student, _ = models(30)
    image, text, scale = (x.detach() for x in student)
    least = distillation_loss(*student, image, text, scale)
    assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(least, student))
    assert least < distillation_loss(text, image.flip(0), scale, image, text, scale)


def test_rounded_products_are_nearly_as_exact():
    student, teacher = models(600, "matched", torch.float32)
    exact, rounded = (distillation_loss(*student, *teacher, matmul_dtype=dtype) for dtype in (None, torch.bfloat16))
    assert rounded != exact
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)


def test_nothing_larger_than_a_tile_is_held():
    student, teacher = models(3000, dtype=torch.float32)
    with LargestTensor() as largest:
        distillation_loss(*student, *teacher).backward()
    assert largest.numel == 384 * 768


@pytest.mark.parametrize("locked", range(3))
def test_a_locked_input_has_no_gradient_and_changes_no_other(locked):
    student, teacher = models(12)
    expected = torch.autograd.grad(distillation(*student, *teacher), student)
    student[locked].requires_grad_(False)
    distillation_loss(*student, *teacher).backward()
    for place, (leaf, grad) in enumerate(zip(student, expected)):
        assert (leaf.grad is None) == (place == locked)
        assert leaf.grad is None or torch.allclose(leaf.grad, grad, atol=1e-12)
