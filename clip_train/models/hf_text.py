"""Any encoder of transformers as a text tower: its features pooled, and a projection."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from clip_train.errors import ConfigError, first_line
from clip_train.hub import heed_network
from clip_train.models.projection import make_projection
from clip_train.models.text_lengths import TokenIds, encode_by_length

POOLS = ("cls", "mean", "last")
# Encoders that make nothing of their padding. Others mix it in: by a Fourier transform, a convolution, landmarks.
_HEED_NO_PADDING = ("bert", "camembert", "deberta-v2", "distilbert", "electra", "gpt2", "mpnet", "mt5", "qwen2")
_HEED_NO_PADDING += ("roberta", "t5", "umt5", "xlm-roberta")
T = TypeVar("T")


class HFTextTower(nn.Module):
    """Token ids to unnormalised embeddings; padding is left out of attention.

    So texts go through in groups of similar length (`text_lengths.py`), where lengths are known and padding is last, if
    the encoder is one that makes nothing of its padding.

    Args:
        name: of a model on the hub, a folder, or a type of transformers such as `bert`, whose config class has the
            sizes; the `options` change them.
        context_length: most tokens in a text.
        embed_dim: width of the joint embedding.
        pretrained: start from the weights of that name, instead of random ones.
        pool: the feature of the first token (`cls`), of the last (`last`), or their mean without the padding (`mean`).
        proj, proj_bias: `linear`, `mlp` or `none`, and whether its last layer has a bias.
        options: entries of the encoder's config.
        length_multiple: of so many tokens the groups are; None for all texts at the full length.

    Raises:
        ConfigError: the encoder is unknown, or not here and cannot be downloaded; it takes shorter texts; it does not
            say which id is padding; or the pooling or projection cannot be made.

    Attributes:
        one_group: all texts of a batch at the length of its longest.
    """

    end_id: int | None = None

    def __init__(
        self,
        name: str,
        context_length: int,
        embed_dim: int,
        pretrained: bool = False,
        pool: str = "mean",
        proj: str = "linear",
        proj_bias: bool = False,
        options: Mapping[str, Any] | None = None,
        length_multiple: int | None = None,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ConfigError(f"model.text.pool={pool} is none of {', '.join(POOLS)}")
        config = _read_config(name, dict(options or {}))
        longest, self.pad_id = getattr(config, "max_position_embeddings", None), getattr(config, "pad_token_id", None)
        if longest is not None and context_length > longest:
            raise ConfigError(f"model.text.context_length={context_length}: {name} takes texts up to {longest} tokens")
        if self.pad_id is None:
            raise ConfigError(f"model.text.name={name}: its config has no pad_token_id; give it in model.text.options")
        short = config.model_type in _HEED_NO_PADDING
        self.length_multiple, self.one_group = length_multiple if short else None, False
        self.vocab_size: int = config.get_text_config().vocab_size
        self.pool = pool
        self.trunk = _make_encoder(name, config, pretrained)
        width: int = self.trunk.config.hidden_size
        self.projection = make_projection(
            proj, width, embed_dim, "model.text", mlp_width=(width + embed_dim) // 2, mlp_bias=False, bias=proj_bias
        )

    def forward(self, ids: Int64[Tensor, "b context"] | TokenIds) -> Float[Tensor, "b embed"]:
        return encode_by_length(self._encode, ids, self.length_multiple, self.measure, self.one_group)

    def measure(self, ids: Int64[Tensor, "b context"]) -> Int64[np.ndarray, " b"]:
        """Tokens of each text up to the last that is no padding, of ids on the host."""
        kept = (ids != self.pad_id).numpy()
        return ids.shape[1] - kept[:, ::-1].argmax(axis=1)

    def _encode(self, ids: Int64[Tensor, "some length"]) -> Float[Tensor, "some embed"]:
        kept = ids != self.pad_id
        states = self.trunk(input_ids=ids, attention_mask=kept.long()).last_hidden_state
        return self.projection(pool_states(states, kept, self.pool))


def pool_states(
    states: Float[Tensor, "b context width"], kept: Bool[Tensor, "b context"], pool: str
) -> Float[Tensor, "b width"]:
    """One feature per text.

    Args:
        states: of each token.
        kept: which tokens are no padding; that may stand on either side.
        pool: `cls`, `mean` or `last`.
    """
    if pool == "mean":
        weights = kept.to(states.dtype)[..., None]
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    positions = torch.arange(kept.shape[1], device=kept.device)
    first, last = positions.where(kept, kept.shape[1] - 1).amin(1), positions.where(kept, 0).amax(1)
    return states[torch.arange(len(states), device=states.device), first if pool == "cls" else last]


def _read_config(name: str, options: dict[str, Any]) -> PretrainedConfig:
    """That of a hub name or folder, or of a type of transformers."""
    if name in CONFIG_MAPPING and not Path(name).is_dir():
        try:
            return AutoConfig.for_model(name, **options)
        except Exception as error:  # its own checks have types of their own
            raise ConfigError(f"model.text.options={options}: {first_line(error)}") from error
    return _load(name, "config", lambda: AutoConfig.from_pretrained(name, **options))


def _make_encoder(name: str, config: PretrainedConfig, pretrained: bool) -> PreTrainedModel:
    """Only what a feature of each token needs: no decoder and no pooler, whose weights would get no gradient."""
    if pretrained and name in CONFIG_MAPPING and not Path(name).is_dir():
        raise ConfigError(f"model.text.pretrained: {name} is a type and has no weights; give a name on the hub")
    if pretrained:
        model = _load(name, "weights", lambda: AutoModel.from_pretrained(name, config=config, dtype=torch.float32))
        model.train()  # it comes in evaluation mode
    else:
        model = AutoModel.from_config(config)
    if config.is_encoder_decoder:
        model = model.get_encoder()
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    model.config.use_cache = False  # of keys and values: no text is continued, and none is computed twice
    return model


def _load(name: str, what: str, load: Callable[[], T]) -> T:
    heed_network()
    try:
        return load()
    except Exception as error:  # a missing file, no network, a broken file, an entry it does not know
        raise ConfigError(
            f"model.text.name={name}: no usable {what} in a folder of that name or in the cache,"
            f" and none can be downloaded ({first_line(error)})"
        ) from error
