"""A linear classifier on the features of a frozen image tower."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.data.class_names import ClassNames
from clip_train.errors import ConfigError
from clip_train.models.dual_encoder import DualEncoder
from clip_train.models.vision_tower import feature_width

FEATURES = ("embedding", "trunk")
HEADS = ("zero_shot", "zeros")


class LinearProbe(DualEncoder):
    """The towers of a model, which stay as they are, and a head.

    Args:
        base: whose towers these are.
        classes: in the order of their labels.
        features: `embedding`, unit vectors of the joint embedding, or `trunk`, what goes into the projection.
        head: what the head starts from: `zero_shot`, the classifier that the class names make, or `zeros`.

    Raises:
        ConfigError: an argument is none of its choices, or class names are to classify features of the trunk.

    Attributes:
        own_classes_only: it cannot tell other classes than those of training.
        head: zeros; who trains the model calls `start_from_names` for another start.
    """

    batch_keys = ("features", "label")

    def __init__(
        self, base: DualEncoder, classes: ClassNames, features: str = "embedding", head: str = "zero_shot"
    ) -> None:
        super().__init__(base.vision, base.text)
        self.take_scalars(base)
        self.requires_grad_(False)
        for key, value, choices in (("features", features, FEATURES), ("head", head, HEADS)):
            if value not in choices:
                raise ConfigError(f"finetune.{key}={value} is none of {', '.join(choices)}")
        if head == "zero_shot" and features == "trunk":
            raise ConfigError("finetune.head=zero_shot needs finetune.features=embedding: take head=zeros with trunk")
        self.own_classes_only = True
        self.classes, self.features, self.initial_head = classes, features, head
        width = self.embed_dim if features == "embedding" else feature_width(self.vision.trunk)
        self.head = nn.Linear(width, len(classes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def image_features(self, pixels: UInt8[Tensor, "b 3 height width"]) -> Float[Tensor, "b width"]:
        """What the head classifies."""
        return image_features(self, pixels, self.features)

    def forward(
        self, features: Float[Tensor, "b width"], labels: Int64[Tensor, " b"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The cross-entropy of each sample, and whether its class scores highest."""
        return losses_and_hits(self._scores(features), labels)

    @torch.no_grad()
    def start_from_names(self, embeddings: Float[Tensor, "classes embed"]) -> None:
        """Set the head to the zero-shot classifier, at the model's temperature."""
        self.head.weight.copy_(self.logit_scale.exp() * embeddings)
        self.head.bias.zero_()

    def make_classifier(self, classes: ClassNames) -> Callable[[Tensor], Tensor]:
        """Pictures to scores of the classes, which are those of training."""
        return lambda pixels: self._scores(self.image_features(pixels))

    def _scores(self, features: Float[Tensor, "b width"]) -> Float[Tensor, "b classes"]:
        with torch.autocast(features.device.type, enabled=False):  # it costs nothing
            return self.head(features.to(self.head.weight.dtype))


def image_features(
    model: DualEncoder, pixels: UInt8[Tensor, "b 3 height width"], features: str
) -> Float[Tensor, "b width"]:
    """What a linear classifier of a model's images can be given.

    Args:
        features: `embedding` or `trunk`, as for `LinearProbe`.
    """
    if features == "embedding":
        return model.encode_image(pixels)
    return model.vision.trunk(model.normalised(pixels)).float()


def losses_and_hits(
    scores: Float[Tensor, "b classes"], labels: Int64[Tensor, " b"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Of each sample the cross-entropy, and whether its class scores highest, which has no gradient."""
    hits = (scores.detach().argmax(dim=1) == labels).float()
    return F.cross_entropy(scores.float(), labels, reduction="none"), hits
