import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clip_train.losses import contrastive_loss
from tests.losses.references import unit_vectors


def pairs(count: int, dim: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    image, text = torch.randn(2, count, dim, dtype=torch.float64, generator=generator).to(dtype)
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def definition(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The loss as the paper's pseudocode has it, term by term."""
    logits = scale * image @ text.T
    rows = torch.stack([-torch.log(torch.exp(row).div(torch.exp(row).sum())[i]) for i, row in enumerate(logits)])
    columns = torch.stack([-torch.log(torch.exp(row).div(torch.exp(row).sum())[i]) for i, row in enumerate(logits.T)])
    return (rows.mean() + columns.mean()) / 2


@pytest.mark.parametrize(("count", "dim", "scale"), [(1, 4, 14.3), (2, 3, 1.0), (17, 5, 14.3), (64, 32, 100.0)])
def test_equals_the_definition(count, dim, scale):
    image, text = pairs(count, dim)
    scale = torch.tensor(scale, dtype=torch.float64)
    assert contrastive_loss(image, text, scale).item() == pytest.approx(
        definition(image, text, scale).item(), rel=1e-12
    )


def test_three_pairs_worked_by_hand():
    """An example from lectures on CLIP, at a temperature of 0.07, its rows taken as they are, without normalisation.

    Every image has its logits in the order of the texts, and for its own text -log p is 0.0000135, 0.000836 and
    0.000235: a mean of 0.00036 (the 0.00016 that is told with the example comes of rounded figures). From texts to
    images the third has the hardest choice, 10 against 4.2857, and the mean is 0.00115. The loss is the mean of both.
    """
    image = torch.eye(3, dtype=torch.float64)
    text = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.0, 0.3, 0.7]], dtype=torch.float64)
    scale = torch.tensor(1 / 0.07, dtype=torch.float64)
    logits = scale * image @ text.T
    expected = torch.tensor([[12.857, 1.4286, 0.0], [1.4286, 11.4286, 4.2857], [0.0, 1.4286, 10.0]]).double()
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    own = torch.arange(3)
    per_image, per_text = (F.cross_entropy(side, own, reduction="none") for side in (logits, logits.T))
    assert per_image.tolist() == pytest.approx([1.35e-5, 8.36e-4, 2.35e-4], rel=5e-3)
    assert per_image.mean().item() == pytest.approx(0.00036, abs=5e-6)
    assert per_text.mean().item() == pytest.approx(0.00115, abs=5e-6)
    loss = contrastive_loss(image, text, scale).item()
    assert loss == pytest.approx((0.00036 + 0.00115) / 2, abs=5e-6)
    assert 2 * loss - per_text.mean().item() == pytest.approx(per_image.mean().item(), rel=1e-9)


def test_gradcheck():
    image, text = (x.requires_grad_() for x in pairs(6, 4))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(contrastive_loss, (image, text, scale))


def test_computed_in_fp32_under_autocast():
    image, text = pairs(64, 32, torch.float32)
    scale = torch.tensor(100.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(image, text, scale)
    assert torch.equal(loss, contrastive_loss(image, text, scale))


@pytest.mark.parametrize(("kind", "scale"), [("random", 14.3), ("random", 100.0), ("matched", 14.3)])
def test_products_of_rounded_features(kind, scale):
    results = []
    for matmul_dtype in (None, torch.bfloat16):
        image, text = (x.float().requires_grad_() for x in unit_vectors(kind, 600, 64))
        loss = contrastive_loss(image, text, torch.tensor(scale), matmul_dtype=matmul_dtype)
        results.append((loss.item(), torch.cat(torch.autograd.grad(loss, (image, text))).flatten()))
    (exact, exact_grad), (rounded, rounded_grad) = results
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-3)
    assert torch.cosine_similarity(rounded_grad, exact_grad, dim=0) > 0.9999


def test_no_more_than_a_tile_of_logits():
    count = 2048
    image, text = (x.float().requires_grad_() for x in unit_vectors("random", count, 8))
    with LargestTensor() as largest:
        contrastive_loss(image, text, torch.tensor(14.3)).backward()
    assert largest.numel == 384 * 768


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that is made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_nan_is_not_hidden():
    image, text = pairs(8, 4)
    image[3, 2] = torch.nan
    assert contrastive_loss(image, text, torch.tensor(14.3)).isnan()


def test_backward_twice_and_a_factor():
    image, text = (x.requires_grad_() for x in pairs(6, 4))
    loss = contrastive_loss(image, text, torch.tensor(5.0))
    once = torch.autograd.grad(loss, (image, text), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (image, text))
    for one, three in zip(once, thrice):
        torch.testing.assert_close(3 * one, three)


def test_an_unknown_exchange_is_named():
    image, text = pairs(2, 4)
    with pytest.raises(ValueError, match="exchange=tree is none of gather, ring"):
        contrastive_loss(image, text, torch.tensor(1.0), exchange="tree")


def test_one_pair_has_no_loss():
    image, text = pairs(1, 8, torch.float32)
    assert contrastive_loss(image, text, torch.tensor(100.0)).item() == 0
