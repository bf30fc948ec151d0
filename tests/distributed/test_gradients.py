"""After averaging over ranks, every gradient is that of one process with the whole batch."""

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clip_train.distributed import group_rank, group_size
from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder
from tests.models.test_dual_encoder import TINY, random_batch
from tests.ranks import pool_group

BATCH = 12


def gradients(ranks: int, dtype: torch.dtype = torch.float32) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step; under DDP on several ranks."""
    torch.manual_seed(0)
    model = create_dual_encoder(**TINY).to(dtype)
    model.logit_scale.data = model.logit_scale.data.to(dtype)
    group = pool_group(ranks)
    rank, world_size = group_rank(group), group_size(group)
    pixels, ids = (x[rank * BATCH // world_size : (rank + 1) * BATCH // world_size] for x in random_batch(BATCH))
    wrapped = DistributedDataParallel(model, process_group=group) if world_size > 1 else model
    if dtype == torch.float64:  # the embeddings are normalised in fp32 otherwise
        image, text = (torch.nn.functional.normalize(x, dim=-1) for x in (tower_image(model, pixels), model.text(ids)))
    else:
        image, text = wrapped(pixels, ids)
    loss = contrastive_loss(image, text, model.logit_scale.exp(), group=group)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def tower_image(model, pixels: Tensor) -> Tensor:
    return model.vision((pixels.double() - model.image_mean) / model.image_std)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_equal_the_float64_reference(pool, world_size):
    loss, expected = gradients(1, torch.float64)
    assert "logit_scale" in expected
    assert len(expected) == len(list(create_dual_encoder(**TINY).parameters()))
    for rank_loss, found in pool.run(gradients, world_size, ranks=world_size):
        assert rank_loss == pytest.approx(loss, rel=1e-6)
        for name, reference in expected.items():
            # Key biases have no influence: their gradient is exactly zero, and rounding in fp32.
            tolerance = 2e-5 * reference.norm() + 5e-7
            assert (found[name].double() - reference).norm() < tolerance, name
