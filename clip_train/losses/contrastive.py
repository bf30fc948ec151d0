"""The symmetric InfoNCE loss of CLIP over the global batch."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from clip_train.distributed import group_rank
from clip_train.losses.exchange import all_gather, mean_over_ranks


def contrastive_loss(
    image: Float[Tensor, "b dim"],
    text: Float[Tensor, "b dim"],
    logit_scale: Float[Tensor, ""],
    *,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE (Radford et al., 2021) where pair i of every rank's rows belongs together.

    Each rank compares its own rows with those of all ranks, in fp32: b x B logits per direction.

    Args:
        image, text: unit vectors of this rank's pairs; every rank has equally many.
        logit_scale: the inverse temperature itself, not its log.
        group: the ranks that share the batch; all by default.

    Returns:
        The mean loss of the global batch, the same on every rank. Averaged over ranks, its gradients are those of one
        process with the whole batch, `logit_scale`'s included.
    """
    with torch.autocast(image.device.type, enabled=False):
        scaled = logit_scale.to(image.dtype) * image
        labels = torch.arange(len(image), device=image.device) + group_rank(group) * len(image)
        to_text = scaled @ all_gather(text, group).T
        to_image = logit_scale.to(text.dtype) * text @ all_gather(image, group).T
        local = (F.cross_entropy(to_text, labels) + F.cross_entropy(to_image, labels)) / 2
    return mean_over_ranks(local, group)
