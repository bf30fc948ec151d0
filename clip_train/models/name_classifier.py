"""A model that learns to classify by the names of classes: cross-entropy over the embeddings of their captions."""

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from clip_train.data.class_names import ClassNames
from clip_train.data.tokenizer_choice import CaptionTokenizer
from clip_train.heartbeat import beat
from clip_train.models.dual_encoder import DualEncoder
from clip_train.models.linear_probe import losses_and_hits
from clip_train.models.prompt_learner import cosines
from clip_train.models.text_lengths import TokenIds

_CAPTIONS_AT_ONCE = 2048  # where nothing is kept for backward


class NameClassifier(DualEncoder):
    """The towers of a model, whatever of them learns, and the captions of the training set's classes.

    It is the loss of CLIP-Adapter (Gao et al., 2021) and CLIP-LoRA (Zanella and Ben Ayed, 2024). Other classes can be
    told as by any model of images and texts.

    Args:
        base: whose towers these are.
        classes: in the order of their labels.
        tokenizer: the model's.

    Raises:
        ConfigError: some classes have more captions than others.
    """

    batch_keys = ("image", "label")

    def __init__(self, base: DualEncoder, classes: ClassNames, tokenizer: CaptionTokenizer) -> None:
        super().__init__(base.vision, base.text)
        self.take_scalars(base)
        self.image_adapter, self.text_adapter = base.image_adapter, base.text_adapter
        self.logit_scale.requires_grad_(base.logit_scale.requires_grad)
        if self.logit_bias is not None:
            self.logit_bias.requires_grad_(False)  # the same for all classes, it changes nothing
        self.classes, self.tokenizer = classes, tokenizer
        self._captions_per_class = classes.captions_per_class
        self._lasting: Tensor | None = None

    def forward(
        self, pixels: UInt8[Tensor, "b 3 height width"], labels: Int64[Tensor, " b"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The cross-entropy of each sample over the classes, and whether its class scores highest."""
        scores = self.logit_scale.exp() * cosines(self.encode_image(pixels), self._class_embeddings())
        return losses_and_hits(scores, labels)

    def _class_embeddings(self) -> Float[Tensor, "classes embed"]:
        """The mean over the templates, as a unit vector."""
        per_caption = self.unit_text(self._features()).unflatten(0, (len(self.classes), self._captions_per_class))
        return F.normalize(per_caption.mean(dim=1), dim=-1)

    def _features(self) -> Float[Tensor, "captions embed"]:
        """The text tower's, of all captions; encoded once if nothing of it learns."""
        if any(parameter.requires_grad for parameter in self.text.parameters()):
            return self.text(self._ids(range(len(self.classes))))
        if self._lasting is None:
            at_once = max(1, _CAPTIONS_AT_ONCE // self._captions_per_class)
            labels = range(len(self.classes))
            with torch.no_grad():
                self._lasting = torch.cat(
                    [self._encode(self._ids(labels[start:][:at_once])) for start in labels[::at_once]]
                )
        return self._lasting

    def _encode(self, ids: Tensor | TokenIds) -> Float[Tensor, "captions embed"]:
        beat()
        return self.text(ids)

    def _ids(self, labels: range) -> Tensor | TokenIds:
        captions = [caption for label in labels for caption in self.classes.captions(label)]
        return self.ids_on_device(torch.from_numpy(self.tokenizer(captions)))
