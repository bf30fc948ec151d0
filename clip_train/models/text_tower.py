"""CLIP's text encoder: the causal transformer from transformers, pooled at the end token, and a projection."""

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from clip_train.data.tokenizer import VOCAB_SIZE
from clip_train.errors import ConfigError
from clip_train.models.fast_layers import use_fast_layers
from clip_train.models.projection import make_projection
from clip_train.models.text_lengths import TokenIds, encode_by_length


class TextTower(nn.Module):
    """Token ids to unnormalised embeddings.

    What follows the end token does not matter: attention is causal and the feature is read there. So texts go through
    in groups of similar length (`text_lengths.py`), where lengths are known. The end token is the last of the
    vocabulary, the start token the one before.

    Args:
        width, layers, heads, mlp_ratio: size of the transformer.
        context_length: most tokens in a text.
        embed_dim: width of the joint embedding.
        quick_gelu: OpenAI's x * sigmoid(1.702 x) for GELU.
        vocab_size: of the token table.
        proj, proj_bias: `linear`, `mlp` or `none`, and whether its last layer has a bias.
        length_multiple: of so many tokens the groups are; None for all texts at the full length.

    Raises:
        ConfigError: the width does not divide over the heads, or the projection cannot be made.

    Attributes:
        one_group: all texts of a batch at the length of its longest.
    """

    pad_id: int | None = None  # any will do

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        context_length: int,
        embed_dim: int,
        quick_gelu: bool = False,
        vocab_size: int = VOCAB_SIZE,
        mlp_ratio: float = 4.0,
        proj: str = "linear",
        proj_bias: bool = False,
        length_multiple: int | None = None,
    ) -> None:
        super().__init__()
        self.length_multiple, self.one_group = length_multiple, False
        self.vocab_size, self.end_id = vocab_size, vocab_size - 1
        self.trunk = create_clip_text(
            width, layers, heads, context_length, vocab_size, mlp_ratio, quick_gelu, embed_dim
        )
        self.projection = make_projection(
            proj,
            width,
            embed_dim,
            "model.text",
            mlp_width=(width + embed_dim) // 2,
            mlp_bias=False,
            bias=proj_bias,
        )
        init_text_transformer(self.trunk)

    def forward(self, ids: Int64[Tensor, "b context"] | TokenIds) -> Float[Tensor, "b embed"]:
        return encode_by_length(self._encode, ids, self.length_multiple, self.measure, self.one_group)

    def measure(self, ids: Int64[Tensor, "b context"]) -> Int64[np.ndarray, " b"]:
        """Tokens of each text, of ids on the host."""
        ends = (ids == self.end_id).numpy()
        return np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, ids.shape[1])

    def _encode(self, ids: Int64[Tensor, "some length"]) -> Float[Tensor, "some embed"]:
        return self.projection(self.trunk(input_ids=ids).pooler_output)


def create_clip_text(
    width: int,
    layers: int,
    heads: int,
    positions: int,
    vocab_size: int,
    mlp_ratio: float,
    quick_gelu: bool,
    embed_dim: int,
) -> CLIPTextModel:
    """transformers' model of CLIP's text; the start and end token are the last two of its vocabulary.

    Raises:
        ConfigError: the width does not divide over the heads.
    """
    if width % heads:
        raise ConfigError(f"model.text: width={width} is not a multiple of heads={heads}")
    trunk = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=int(mlp_ratio * width),
            projection_dim=embed_dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=positions,
            hidden_act="quick_gelu" if quick_gelu else "gelu",
            layer_norm_eps=1e-5,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=0,
        )
    )
    use_fast_layers(trunk)
    return trunk


def init_text_transformer(trunk: CLIPTextModel) -> None:
    """Initialise as the code of the CLIP paper does (github.com/openai/CLIP, `initialize_parameters`).

    The matrices that write to the residual stream are scaled down by the square root of their number. Attention's
    biases are zero, those of the MLP are torch's.
    """
    width, layers = trunk.config.hidden_size, trunk.config.num_hidden_layers
    attention_std, fc_std = width**-0.5, (2 * width) ** -0.5
    residual_std = attention_std * (2 * layers) ** -0.5
    nn.init.normal_(trunk.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(trunk.embeddings.position_embedding.weight, std=0.01)
    stds = {"q_proj": attention_std, "k_proj": attention_std, "v_proj": attention_std, "out_proj": residual_std}
    stds |= {"fc1": fc_std, "fc2": residual_std}
    for name, linear in trunk.encoder.named_modules():
        if isinstance(linear, nn.Linear):
            linear.reset_parameters()
            nn.init.normal_(linear.weight, std=stds[name.rpartition(".")[2]])
            if name.endswith("_proj"):
                nn.init.zeros_(linear.bias)
