"""CoCa's unimodal text encoder (Yu et al., 2022): CLIP's, read at a token of its own at the end."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.data.tokenizer import VOCAB_SIZE
from clip_train.models.projection import make_projection
from clip_train.models.text_tower import create_clip_text, init_text_transformer


class CaptionTextTower(nn.Module):
    """Token ids to unnormalised embeddings, and to a state per token for a decoder.

    A learned token follows the text, its padding included, and gives the embedding. It does not see the padding, but
    for the first: as in open_clip, whose weights have learned it so, the mask is shifted by one.

    Args:
        width, layers, heads, context_length, embed_dim, quick_gelu, vocab_size, mlp_ratio, proj, proj_bias: as of
            `TextTower`; the length without the learned token.

    Raises:
        ConfigError: the width does not divide over the heads, or the projection cannot be made.
    """

    pad_id = 0

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
    ) -> None:
        super().__init__()
        self.vocab_size, self.context_length = vocab_size, context_length
        self.start_id, self.end_id = vocab_size - 2, vocab_size - 1
        self.cls_emb = nn.Parameter(torch.empty(width))
        self.trunk = create_clip_text(
            width, layers, heads, context_length + 1, vocab_size, mlp_ratio, quick_gelu, embed_dim
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
        nn.init.normal_(self.cls_emb, std=0.01)
        init_text_transformer(self.trunk)

    def forward(
        self, ids: Int64[Tensor, "b length"]
    ) -> tuple[Float[Tensor, "b embed"], Float[Tensor, "b length width"]]:
        """Texts of any length up to `context_length`."""
        words = self.trunk.embeddings.token_embedding(ids)
        with_cls = torch.cat([words, self.cls_emb.expand(ids.shape[0], 1, -1)], dim=1)
        states = self.trunk.encoder(
            inputs_embeds=self.trunk.embeddings(inputs_embeds=with_cls),
            attention_mask=_mask(ids != self.pad_id),
            is_causal=False,  # the mask is
        ).last_hidden_state
        return self.projection(self.trunk.final_layer_norm(states[:, -1])), states[:, :-1]


def _mask(kept: Bool[Tensor, "b length"]) -> Bool[Tensor, "b 1 queries keys"]:
    """Which tokens see which, the learned one included: none a later one, none the token after padding."""
    keys = F.pad(kept, (1, 0), value=True)
    causal = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=keys.device).tril()
    return causal & keys[:, None, None, :]
