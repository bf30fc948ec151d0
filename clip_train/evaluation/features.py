"""Embeddings of a whole validation set, each rank encoding its share."""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clip_train.data.eval_batches import EvalBatches, rank_slices
from clip_train.data.loader import make_loader
from clip_train.distributed import agreed, gather_parts, group_rank, group_size
from clip_train.errors import DataError
from clip_train.evaluation.progress import told
from clip_train.evaluation.zero_shot import evaluating
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
    device = model.logit_scale.device
    width = model.embed_dim
    images, texts = [torch.empty(0, width, device=device)], [torch.empty(0, width, device=device)]
    slices = rank_slices(len(batches), group_rank(), group_size(), batch_size)
    with agreed(batch_size), evaluating(model), autocast:
        for batch in told(make_loader(batches, slices, num_workers), len(batches)):
            if batch["error"]:
                raise DataError(batch["error"])
            if len(batch["image"]):
                images.append(model.encode_image(batch["image"].to(device)))
                texts.append(model.encode_text(batch["text"]))
    return Features(*(gather_parts(torch.cat(side), len(batches)) for side in (images, texts)))
