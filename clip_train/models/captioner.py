"""CoCa (Yu et al., 2022, arXiv:2205.01917): a dual encoder with a decoder that writes captions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from clip_train.data.tokenizer import VOCAB_SIZE
from clip_train.errors import ConfigError
from clip_train.models.attentional_pooler import PooledVisionTower
from clip_train.models.caption_text import CaptionTextTower
from clip_train.models.decoder import CaptionDecoder, DecoderConfig
from clip_train.models.dual_encoder import DualEncoder
from clip_train.models.text_config import CLIP, TextConfig

Pixels = UInt8[Tensor, "b 3 height width"] | Float[Tensor, "b 3 height width"]


class Captioner(DualEncoder):
    """Images and texts to unit vectors, and images to captions.

    Args:
        vision, text: towers that give tokens as well.
        decoder: from those tokens to the next word.
        settings: what else `DualEncoder` takes.
    """

    vision: PooledVisionTower
    text: CaptionTextTower

    def __init__(
        self, vision: PooledVisionTower, text: CaptionTextTower, decoder: CaptionDecoder, *settings: Any
    ) -> None:
        super().__init__(vision, text, *settings)  # pyright: ignore[reportArgumentType]
        self.decoder = decoder

    @property
    def towers(self) -> tuple[nn.Module, ...]:
        return *super().towers, self.decoder

    def encode_image(self, pixels: Pixels) -> Float[Tensor, "b embed"]:
        return self.unit_image(self.vision(self.normalised(pixels))[0])

    def encode_text(self, ids: Int64[Tensor, "b context"]) -> Float[Tensor, "b embed"]:
        return self.unit_text(self.text(self.ids_on_device(ids))[0])

    def encode_image_tokens(self, pixels: Pixels) -> Float[Tensor, "b tokens embed"]:
        """What the decoder looks at."""
        return self.vision(self.normalised(pixels))[1]

    def next_token_logits(
        self, image_tokens: Float[Tensor, "b tokens embed"], ids: Int64[Tensor, "b length"], last: int = 0
    ) -> Float[Tensor, "b kept vocab"]:
        """Of the token that comes after each of a beginning of a caption, or after the `last` ones if that is not 0."""
        return self.decoder.logits(image_tokens, self.text(ids)[1], last)

    def forward(
        self, pixels: Pixels, ids: Int64[Tensor, "b context"]
    ) -> tuple[Float[Tensor, "b embed"], Float[Tensor, "b embed"], Float[Tensor, " b"], Int64[Tensor, " b"]]:
        """Embeddings of images and texts; of each caption, the sum of -ln p of its tokens, and how many they are."""
        image, image_tokens = self.vision(self.normalised(pixels))
        text, states = self.text(ids)
        labels = ids[:, 1:]
        caption_loss = self.decoder(image_tokens, states[:, :-1], labels)
        counts = torch.count_nonzero(labels != self.decoder.pad_id, dim=1)
        return self.unit_image(image), self.unit_text(text), caption_loss, counts


def create_captioner(
    embed_dim: int,
    image_size: int,
    quick_gelu: bool,
    *,
    vision: Mapping[str, Any],
    text: TextConfig,
    decoder: Mapping[str, Any],
    settings: Sequence[Any] = (),
) -> Captioner:
    """The model of a `model` group with a `decoder`.

    Args:
        embed_dim, image_size, quick_gelu, vision, text, decoder: as of `create_dual_encoder`.
        settings: what else `DualEncoder` takes, in order.

    Raises:
        ConfigError: the towers are not such as a decoder can be joined to.
    """
    if text.name != CLIP or text.tokenizer not in (None, CLIP):
        raise ConfigError(f"model.decoder goes with model.text.name={CLIP} and its tokenizer only")
    if text.width != embed_dim:
        raise ConfigError(f"model.decoder needs model.text.width={text.width} and model.embed_dim={embed_dim} equal")
    trunk = dict(vision)
    if trunk.pop("pretrained", False):
        raise ConfigError("model.vision.pretrained does not go with model.decoder: give false, or init_from=")
    config, vocab_size = DecoderConfig.of(decoder), text.vocab_size or VOCAB_SIZE
    pooled = PooledVisionTower(
        **trunk,
        image_size=image_size,
        embed_dim=embed_dim,
        queries=config.attn_pooler_queries,
        heads=config.attn_pooler_heads,
        quick_gelu=quick_gelu,
    )
    words = CaptionTextTower(
        width=text.width,
        layers=text.layers,
        heads=text.heads,
        context_length=text.context_length,
        embed_dim=embed_dim,
        quick_gelu=quick_gelu,
        vocab_size=vocab_size,
        mlp_ratio=text.mlp_ratio,
        proj=text.proj,
        proj_bias=text.proj_bias,
    )
    writer = CaptionDecoder(text.width, config, vocab_size, words.pad_id, quick_gelu)
    return Captioner(pooled, words, writer, *settings)
