"""The loss of models that classify: the mean of what each sample costs, and how many they got right."""

from jaxtyping import Float
from torch import Tensor

from clip_train.losses.exchange import mean_over_ranks


class ClassificationLoss:
    """Called as the other losses are.

    Attributes:
        metrics: `train/top1` of the global batch of the last call, on the device.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Tensor] = {}

    def __call__(
        self, losses: Float[Tensor, " b"], hits: Float[Tensor, " b"], **logit_parameters: Tensor
    ) -> Float[Tensor, ""]:
        """The mean over the global batch, the same on every rank; averaged over ranks, its gradients are those of it.

        Args:
            losses: of this rank's samples.
            hits: 1 for each that was classified rightly, else 0; without gradient.
            logit_parameters: are not used.
        """
        self.metrics = {"train/top1": mean_over_ranks(hits.detach().float().mean(), None)}
        local = losses.mean()
        return local + (mean_over_ranks(local.detach(), None) - local.detach())
