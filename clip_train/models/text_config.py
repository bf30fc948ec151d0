"""The `model.text` group of the configs: its keys, their defaults, and which tower each is for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from clip_train.errors import ConfigError

CLIP, SIGLIP = "clip", "siglip"
_OF_TRANSFORMERS = ("pretrained", "pool", "options")  # make no sense for CLIP's and SigLIP's towers


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What kind of text tower, of what size, and the tokenizer that goes with it.

    Attributes:
        name: `clip`, `siglip`, or an encoder of transformers: a name on the hub, a folder, or a type such as `bert`.
        context_length: most tokens in a text.
        tokenizer: `clip`, or one of transformers by name or folder; None for the tower's own.
        clean: what is done to captions before a tokenizer of transformers: `whitespace`, `lower` or `canonicalize`.
        vocab_size: of the token table; None for CLIP's.
        width, layers, heads, mlp_ratio: size of CLIP's or SigLIP's transformer.
        hidden_act: activation of SigLIP's, under transformers' names.
        proj: `linear`, `mlp` or `none`, of CLIP's tower and encoders of transformers; SigLIP's has its own.
        proj_bias: whether the projection's last layer has a bias.
        pretrained, pool, options: of encoders of transformers: whether to start from their weights, the feature
            (`cls`, `mean` or `last`), and further entries of their config.
        length_multiple: texts go through in groups of similar length, each cut to a multiple of so many tokens; None
            for all at the full length. SigLIP's and CoCa's towers, which are read after the padding, take no heed.
    """

    name: str = CLIP
    context_length: int = 77
    tokenizer: str | None = None
    clean: str = "whitespace"
    vocab_size: int | None = None
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    hidden_act: str = "gelu"
    proj: str = "linear"
    proj_bias: bool = False
    pretrained: bool = False
    pool: str = "mean"
    options: Mapping[str, Any] = field(default_factory=dict)
    length_multiple: int | None = 8

    @classmethod
    def of(cls, text: Mapping[str, Any]) -> "TextConfig":
        """From the composed config; keys may be missing.

        Raises:
            ConfigError: a key is unknown, or the tower has no use for it.
        """
        known = [entry.name for entry in fields(cls)]
        if unknown := sorted(set(text) - set(known)):
            raise ConfigError(f"model.text.{unknown[0]}: no such key; there are {', '.join(known)}")
        config = cls(**text)
        if config.length_multiple is not None and config.length_multiple < 1:
            raise ConfigError(f"model.text.length_multiple={config.length_multiple} is neither null nor at least 1")
        if config.name in (CLIP, SIGLIP):
            if config.width % config.heads:
                raise ConfigError(f"model.text: width={config.width} is not a multiple of heads={config.heads}")
            for key in _OF_TRANSFORMERS:
                if getattr(config, key) != getattr(cls(), key):
                    raise ConfigError(f"model.text.{key} is for encoders of transformers, not for {config.name}")
        if config.name == SIGLIP and config.proj != "none":
            raise ConfigError(f"model.text.proj={config.proj}: SigLIP's tower ends with a head of its own; give none")
        return config

    @property
    def tokenizer_name(self) -> str:
        """Raises ConfigError if none is given and the tower has none of its own."""
        if self.tokenizer is None and self.name == SIGLIP:
            raise ConfigError("model.text.tokenizer has no value: give SigLIP's, such as timm/ViT-B-16-SigLIP")
        return self.tokenizer or self.name
