"""The CLIP model: two towers, one joint embedding, one learned temperature."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.data.tokenizer import VOCAB_SIZE
from clip_train.errors import ConfigError
from clip_train.models.activation_checkpointing import NONE, checkpoint_blocks, checkpointing_mode
from clip_train.models.hf_text import HFTextTower
from clip_train.models.siglip_text import SiglipTextTower
from clip_train.models.text_config import CLIP, SIGLIP, TextConfig
from clip_train.models.text_lengths import TokenIds, on_device
from clip_train.models.text_tower import TextTower
from clip_train.models.vision_tower import VisionTower

AnyTextTower = TextTower | SiglipTextTower | HFTextTower

# Mean and standard deviation of the red, green and blue of OpenAI's training pictures.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)

_VISION_KEYS = ("name", "options", "proj", "pretrained", "patch_dropout")


class DualEncoder(nn.Module):
    """Images and texts to unit vectors whose cosine says how well they match (Radford et al., 2021).

    Attributes:
        batch_keys: the entries of a batch that `forward` takes.
        logit_scale: log of the inverse temperature. It stays in fp32 whatever the model is converted to: in bf16 its
            step near ln 100 is 0.03. So does the bias.
        logit_bias: what the sigmoid loss adds to the logits; None where the loss has no bias.
        embed_dim: width of the embedding.
        image_adapter, text_adapter: between a tower's features and its unit vector; nothing, but for fine-tuning.
    """

    batch_keys: tuple[str, ...] = ("image", "text")
    image_mean: Tensor
    image_std: Tensor
    logit_bias: nn.Parameter | None

    def __init__(
        self,
        vision: VisionTower,
        text: AnyTextTower,
        image_mean: Sequence[float] = OPENAI_MEAN,
        image_std: Sequence[float] = OPENAI_STD,
        init_logit_scale: float = INITIAL_LOGIT_SCALE,
        init_logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = vision.embed_dim
        self.vision = vision
        self.text = text
        self.image_adapter, self.text_adapter = nn.Identity(), nn.Identity()
        self.logit_scale = nn.Parameter(torch.tensor(float(init_logit_scale)))
        bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))
        self.register_parameter("logit_bias", bias)
        self.register_buffer("image_mean", 255 * torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", 255 * torch.tensor(image_std).view(3, 1, 1), persistent=False)

    def encode_image(
        self, pixels: UInt8[Tensor, "b 3 height width"] | Float[Tensor, "b 3 height width"]
    ) -> Float[Tensor, "b embed"]:
        """Unit vectors. uint8 pixels are normalised here, on the device; others are taken as normalised."""
        return self.unit_image(self.vision(self.normalised(pixels)))

    def normalised(
        self, pixels: UInt8[Tensor, "b 3 height width"] | Float[Tensor, "b 3 height width"]
    ) -> Float[Tensor, "b 3 height width"]:
        """What the image tower takes: uint8 pixels less their mean, over their deviation; others as they are.

        They are computed in the buffers' type, in one piece of memory. Under autocast they are rounded to its type: the
        tower's first product would round them the same, after a copy patch by patch in twice the bytes.
        """
        if pixels.dtype != torch.uint8:
            return pixels
        device = pixels.device.type
        normalised = pixels.to(self.image_mean.dtype).sub_(self.image_mean).div_(self.image_std)
        return normalised.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normalised

    def encode_text(self, ids: Int64[Tensor, "b context"] | TokenIds) -> Float[Tensor, "b embed"]:
        """Unit vectors. Ids that are on the host, wherever the model is, take only the time that their lengths need."""
        return self.unit_text(self.text(self.ids_on_device(ids)))

    def ids_on_device(self, ids: Int64[Tensor, "b context"] | TokenIds) -> Tensor | TokenIds:
        """What the text tower takes."""
        return on_device(ids, self.text, self.logit_scale.device)

    def unit_image(self, features: Float[Tensor, "b embed"]) -> Float[Tensor, "b embed"]:
        """What is compared with texts, of the image tower's features."""
        return F.normalize(self.image_adapter(features).float(), dim=-1)

    def unit_text(self, features: Float[Tensor, "b embed"]) -> Float[Tensor, "b embed"]:
        """What is compared with images, of the text tower's features."""
        return F.normalize(self.text_adapter(features).float(), dim=-1)

    def forward(
        self, pixels: UInt8[Tensor, "b 3 height width"], ids: Int64[Tensor, "b context"] | TokenIds
    ) -> tuple[Float[Tensor, "b embed"], Float[Tensor, "b embed"]]:
        """Embeddings of images and texts."""
        return self.encode_image(pixels), self.encode_text(ids)

    @property
    def towers(self) -> tuple[nn.Module, ...]:
        """What is made of blocks."""
        return self.vision, self.text

    def logit_parameters(self) -> dict[str, Float[Tensor, ""]]:
        """What the losses take besides features: the inverse temperature, and the bias if there is one."""
        parameters = {"logit_scale": self.logit_scale.exp()}
        if self.logit_bias is not None:
            parameters["logit_bias"] = self.logit_bias
        return parameters

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale between 1 and 100; to be called after each optimizer step."""
        if self.logit_scale.requires_grad:  # one that is frozen stays as it is
            self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    @torch.no_grad()
    def take_scalars(self, other: "DualEncoder") -> None:
        """Take over another model's temperature, bias and normalisation of pixels."""
        self.logit_scale.copy_(other.logit_scale)
        self.logit_bias = other.logit_bias
        self.image_mean.copy_(other.image_mean)
        self.image_std.copy_(other.image_std)

    def _apply(self, fn, recurse: bool = True):
        kept = [
            (scalar, scalar.detach().clone()) for scalar in (self.logit_scale, self.logit_bias) if scalar is not None
        ]
        super()._apply(fn, recurse)
        for scalar, value in kept:
            if not value.is_meta:
                scalar.data = value.to(scalar.device)
        return self


def create_dual_encoder(
    *,
    embed_dim: int,
    image_size: int,
    vision: Mapping,
    text: Mapping,
    quick_gelu: bool = False,
    grad_checkpointing: bool | str = NONE,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    image_mean: Sequence[float] = OPENAI_MEAN,
    image_std: Sequence[float] = OPENAI_STD,
    init_logit_scale: float = INITIAL_LOGIT_SCALE,
    init_logit_bias: float | None = None,
    decoder: Mapping | None = None,
) -> DualEncoder:
    """Build a model from the `model` group of the configs.

    Args:
        embed_dim: width of the joint embedding.
        image_size: side of the input, in pixels.
        vision: `name` of a timm model, and what else `VisionTower` takes.
        text: entries of `TextConfig`.
        quick_gelu: activation of the image tower and of CLIP's text tower; OpenAI's weights need it.
        grad_checkpointing: what the blocks compute again in backward, one of `checkpointing.MODES`; true or false.
        resize_mode, interpolation: of the preparation of pictures, which is not done here.
        image_mean, image_std: normalisation of the pixels, for values in [0, 1].
        init_logit_scale: where the log of the inverse temperature starts.
        init_logit_bias: where the bias of the sigmoid loss starts; None for no bias.
        decoder: entries of `DecoderConfig`, for a `Captioner`; None for a model without a decoder.

    Raises:
        ConfigError: a tower is unknown, cannot be loaded, or refuses a setting.
    """
    if unknown := sorted(set(vision) - set(_VISION_KEYS)):
        raise ConfigError(f"model.vision.{unknown[0]}: no such key; there are {', '.join(_VISION_KEYS)}")
    mode = checkpointing_mode(grad_checkpointing)
    settings = (image_mean, image_std, init_logit_scale, init_logit_bias)
    if decoder is None:
        model = DualEncoder(
            VisionTower(**vision, image_size=image_size, embed_dim=embed_dim, quick_gelu=quick_gelu),
            _text_tower(TextConfig.of(text), embed_dim, quick_gelu),
            *settings,
        )
    else:
        from clip_train.models.captioner import create_captioner  # which is made of a DualEncoder

        towers = {"vision": vision, "text": TextConfig.of(text), "decoder": decoder}
        model = create_captioner(embed_dim, image_size, quick_gelu, **towers, settings=settings)
    if mode != NONE:
        for tower in model.towers:
            checkpoint_blocks(tower, mode)
    return model


def _text_tower(text: TextConfig, embed_dim: int, quick_gelu: bool) -> AnyTextTower:
    length = {"context_length": text.context_length, "embed_dim": embed_dim}
    if text.name not in (CLIP, SIGLIP):
        return HFTextTower(
            text.name,
            **length,
            pretrained=text.pretrained,
            pool=text.pool,
            proj=text.proj,
            proj_bias=text.proj_bias,
            options=text.options,
            length_multiple=text.length_multiple,
        )
    size = {"width": text.width, "layers": text.layers, "heads": text.heads, "mlp_ratio": text.mlp_ratio}
    size["vocab_size"] = text.vocab_size or VOCAB_SIZE
    if text.name == SIGLIP:
        return SiglipTextTower(**length, **size, hidden_act=text.hidden_act)
    projection = {"proj": text.proj, "proj_bias": text.proj_bias}
    return TextTower(**length, **size, **projection, quick_gelu=quick_gelu, length_multiple=text.length_multiple)
