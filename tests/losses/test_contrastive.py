import pytest
import torch
from torch.nn import functional as F

from clip_train.losses import contrastive_loss


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


def test_one_pair_has_no_loss():
    image, text = pairs(1, 8, torch.float32)
    assert contrastive_loss(image, text, torch.tensor(100.0)).item() == 0
