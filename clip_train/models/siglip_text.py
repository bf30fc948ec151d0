"""SigLIP's text encoder (Zhai et al., 2023): a transformer that is not causal, read at its last position."""

from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import SiglipTextConfig, SiglipTextModel


class SiglipTextTower(nn.Module):
    """Token ids, padded to the full length, to unnormalised embeddings.

    Padding is attended to like any token, and the last position, mostly padding, is the feature. The model's own head
    is the projection.

    Args:
        width, layers, heads, mlp_ratio: size of the transformer.
        context_length: tokens in every text.
        embed_dim: width of the joint embedding.
        vocab_size: of the token table.
        hidden_act: `gelu` or `gelu_pytorch_tanh`.
    """

    pad_id: int | None = None  # that of the tokenizer, whichever it is, is learned
    end_id: int | None = None

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        context_length: int,
        embed_dim: int,
        vocab_size: int,
        mlp_ratio: float = 4.0,
        hidden_act: str = "gelu",
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.trunk = SiglipTextModel(
            SiglipTextConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                intermediate_size=int(mlp_ratio * width),
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=context_length,
                hidden_act=hidden_act,
                layer_norm_eps=1e-6,
                projection_size=embed_dim,
                bos_token_id=None,  # those of transformers' own defaults are not in the vocabulary
                eos_token_id=None,
            )
        )

    def forward(self, ids: Int64[Tensor, "b context"]) -> Float[Tensor, "b embed"]:
        return self.trunk(input_ids=ids).pooler_output
