"""CLIP-Adapter (Gao et al., 2021, arXiv:2110.04544): a residual bottleneck on a tower's features."""

from jaxtyping import Float
from torch import Tensor, nn

from clip_train.errors import ConfigError


class FeatureAdapter(nn.Module):
    """`ratio` new features and the rest those of the tower.

    Args:
        width: of the embedding.
        ratio: share of the new features.
        reduction: how many times narrower the hidden layer is.

    Raises:
        ConfigError: the ratio is no share, or the hidden layer would be empty.
    """

    def __init__(self, width: int, ratio: float, reduction: int) -> None:
        super().__init__()
        if not 0 <= ratio <= 1:
            raise ConfigError(f"finetune.ratio={ratio} is a share: give at least 0 and at most 1")
        if not 1 <= reduction <= width:
            raise ConfigError(f"finetune.reduction={reduction}: give at least 1 and at most model.embed_dim={width}")
        self.ratio = ratio
        self.down = nn.Linear(width, width // reduction, bias=False)
        self.up = nn.Linear(width // reduction, width, bias=False)

    def forward(self, features: Float[Tensor, "b embed"]) -> Float[Tensor, "b embed"]:
        new = self.up(self.down(features).relu()).relu()
        return self.ratio * new + (1 - self.ratio) * features
