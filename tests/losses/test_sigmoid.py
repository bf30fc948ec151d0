import pytest
import torch

from clip_train.losses import sigmoid_loss
from tests.losses import references
from tests.losses.test_contrastive import pairs


@pytest.mark.parametrize(("count", "dim", "scale", "bias"), [(1, 4, 10, -10), (17, 5, 1, 0), (600, 33, 100, -10)])
def test_equals_the_definition(count, dim, scale, bias):
    inputs = [*pairs(count, dim), torch.tensor(float(scale)).double(), torch.tensor(float(bias)).double()]
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    sigmoid_loss(*ours).backward()
    expected = references.sigmoid(*theirs)
    expected.backward()
    assert sigmoid_loss(*ours).item() == pytest.approx(expected.item(), rel=1e-12)
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-14)
