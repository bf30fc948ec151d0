"""Embeddings of a whole validation set, each rank encoding its share."""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clip_train.data.eval_batches import EvalBatches, rank_sizes, rank_slices
from clip_train.data.loader import make_loader
from clip_train.distributed import gather_ragged, group_rank, group_size, raise_everywhere
from clip_train.heartbeat import beat
from clip_train.models import DualEncoder


class Features(NamedTuple):
    """Unit vectors of all pairs of a set, on every rank, in the set's order."""

    image: Float[Tensor, "pairs embed"]
    text: Float[Tensor, "pairs embed"]


@torch.no_grad()
def encode_pairs(
    model: DualEncoder, batches: EvalBatches, *, batch_size: int, num_workers: int, autocast: AbstractContextManager
) -> Features:
    """Embed every pair exactly once, however many ranks there are.

    Args:
        batch_size: pairs per forward pass on a rank.
        num_workers: loader processes.
        autocast: the precision to compute in.

    Raises:
        DataError: on every rank, if a sample cannot be used.
    """
    rank, world_size = group_rank(), group_size()
    device = model.logit_scale.device
    width = model.embed_dim
    images, texts, error = [torch.empty(0, width, device=device)], [torch.empty(0, width, device=device)], ""
    was_training = model.training
    model.eval()
    with autocast:
        for batch in make_loader(batches, rank_slices(len(batches), rank, world_size, batch_size), num_workers):
            beat()
            error = error or batch["error"]
            if not error and len(batch["image"]):
                images.append(model.encode_image(batch["image"].to(device)))
                texts.append(model.encode_text(batch["text"]))
    model.train(was_training)
    raise_everywhere(error)
    sizes = rank_sizes(len(batches), world_size)
    return Features(gather_ragged(torch.cat(images), sizes), gather_ragged(torch.cat(texts), sizes))
