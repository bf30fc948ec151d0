"""Learned words before the class names: CoOp (Zhou et al., 2021, arXiv:2109.01134) and CoCoOp (2022, 2203.05557)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip_train.data.class_names import ClassNames
from clip_train.data.tokenizer_choice import CaptionTokenizer
from clip_train.errors import ConfigError
from clip_train.models.activation_checkpointing import is_checkpointed
from clip_train.models.dual_encoder import DualEncoder
from clip_train.models.linear_probe import losses_and_hits
from clip_train.models.text_tower import TextTower

_META_REDUCTION = 16
_PROMPTS_AT_ONCE = 2048  # in evaluation
_RECOMPUTED_AT_ONCE = 128


class PromptLearner(DualEncoder):
    """The towers of a model, which stay as they are, and vectors in place of the words around a class name.

    A prompt is the start token, the context, the class name, a full stop and the end token.

    Args:
        base: whose towers these are; its text tower is CLIP's.
        classes: in the order of their labels.
        tokenizer: the model's.
        n_ctx: context vectors.
        csc: each class has context vectors of its own; else all share them.
        init: words whose embeddings the context starts from; None starts from noise.
        conditional: a small network adds to the context what it makes of each picture (CoCoOp).

    Raises:
        ConfigError: the text tower takes no vectors for words, the context has no room or is not as long as its words,
            or each class and each picture are to have their own.

    Attributes:
        own_classes_only: it cannot tell other classes than those of training.
    """

    batch_keys = ("image", "label")
    closed_towers = ("vision",)  # the context is put into the text tower
    class_ids: Tensor
    text: TextTower

    def __init__(
        self,
        base: DualEncoder,
        classes: ClassNames,
        tokenizer: CaptionTokenizer,
        *,
        n_ctx: int,
        csc: bool = False,
        init: str | None = None,
        conditional: bool = False,
    ) -> None:
        super().__init__(base.vision, base.text)
        self.take_scalars(base)
        self.requires_grad_(False)
        if not isinstance(self.text, TextTower):
            found = type(self.text).__name__
            raise ConfigError(f"finetune=prompt puts vectors into CLIP's text tower; this model has a {found}")
        if csc and conditional:
            raise ConfigError("finetune.csc and finetune.conditional do not go together: give one of them")
        if not 1 <= n_ctx <= tokenizer.context_length - 3:
            raise ConfigError(
                f"finetune.n_ctx={n_ctx} is not from 1 to {tokenizer.context_length - 3}, which leaves room for a name"
                f" in model.text.context_length={tokenizer.context_length}"
            )
        self.text.one_group = True  # each text has its row of context
        self.own_classes_only = csc
        self.classes, self.tokenizer, self.n_ctx = classes, tokenizer, n_ctx
        words = self.text.trunk.get_input_embeddings()
        assert isinstance(words, nn.Embedding)
        width = words.embedding_dim
        self.register_buffer("class_ids", self._prompt_ids(classes.names), persistent=False)
        noise = torch.empty(n_ctx, width).normal_(std=0.02)
        start = noise if init is None else _embedded(words, tokenizer, init, n_ctx)
        self.context = nn.Parameter(start.repeat(len(classes), 1, 1) if csc else start)
        self.meta_net = _meta_net(self.embed_dim, width) if conditional else None

    def forward(
        self, pixels: UInt8[Tensor, "b 3 height width"], labels: Int64[Tensor, " b"]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The cross-entropy of each sample over the classes, and whether its class scores highest."""
        with torch.no_grad():
            images = self.encode_image(pixels)
        return losses_and_hits(self._scores(images, self.class_ids), labels)

    def make_classifier(self, classes: ClassNames) -> Callable[[Tensor], Tensor]:
        """Pictures to scores of these classes, which need not be those of training unless each has its own context."""
        ids = self._prompt_ids(classes.names).to(self.class_ids.device)
        if self.meta_net is None:
            texts = self._encode_prompts(ids, self.context)
            return lambda pixels: cosines(self.encode_image(pixels), texts)
        at_once = max(1, _PROMPTS_AT_ONCE // len(ids))
        return lambda pixels: torch.cat(
            [self._scores(images, ids) for images in self.encode_image(pixels).split(at_once)]
        )

    def _scores(self, images: Float[Tensor, "b embed"], ids: Int64[Tensor, "classes length"]) -> Tensor:
        scale = self.logit_scale.exp()
        if self.meta_net is None:
            return scale * cosines(images, self._encode_prompts(ids, self.context))
        shifts = self.meta_net(images).float()
        contexts = (self.context + shifts[:, None]).repeat_interleave(len(ids), dim=0)
        texts = self._encode_prompts(ids.repeat(len(images), 1), contexts).view(len(images), len(ids), -1)
        return scale * (images[:, None] * texts).sum(2)

    def _encode_prompts(self, ids: Int64[Tensor, "prompts length"], context: Tensor) -> Float[Tensor, "prompts embed"]:
        if not (is_checkpointed(self.text) and torch.is_grad_enabled()):
            return self._encode(ids, context)
        # The blocks' own checkpointing is for towers in training mode, which one that is frozen is never in.
        parts = ids.split(_RECOMPUTED_AT_ONCE)
        contexts = context.split(_RECOMPUTED_AT_ONCE) if context.dim() == 3 else [context] * len(parts)
        return torch.cat(
            [checkpoint(self._encode, *part, use_reentrant=False) for part in zip(parts, contexts)]  # pyright: ignore
        )

    def _encode(self, ids: Int64[Tensor, "prompts length"], context: Tensor) -> Float[Tensor, "prompts embed"]:
        with _put_in(self.text.trunk.get_input_embeddings(), context):
            return self.encode_text(ids)

    def _prompt_ids(self, names: Sequence[str]) -> Int64[Tensor, "classes length"]:
        """With a word of one token where each context vector goes; as long as the longest of them."""
        ids = torch.from_numpy(self.tokenizer([f"{'x ' * self.n_ctx}{name}." for name in names]))
        return ids[:, : self.text.measure(ids).max()]


def cosines(images: Float[Tensor, "b embed"], texts: Float[Tensor, "classes embed"]) -> Float[Tensor, "b classes"]:
    """Of unit vectors, in fp32 whatever the precision of the towers."""
    with torch.autocast(images.device.type, enabled=False):  # in bf16 near classes would be equal
        return images @ texts.T


def _meta_net(embed_dim: int, width: int) -> nn.Sequential:
    hidden = max(1, embed_dim // _META_REDUCTION)
    return nn.Sequential(nn.Linear(embed_dim, hidden), nn.ReLU(), nn.Linear(hidden, width))


@contextmanager
def _put_in(words: nn.Module, context: Tensor) -> Iterator[None]:
    """Context vectors, one row for all texts or one for each, take the place of the words after the start token."""

    def replace(module: nn.Module, ids: tuple, embedded: Tensor) -> Tensor:
        count = context.shape[-2]
        vectors = context.to(embedded.dtype).expand(len(embedded), count, -1)
        return torch.cat([embedded[:, :1], vectors, embedded[:, 1 + count :]], dim=1)

    handle = words.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _embedded(words: nn.Embedding, tokenizer: CaptionTokenizer, init: str, n_ctx: int) -> Tensor:
    """The embeddings of words. Raises ConfigError if they are not as many as the context vectors."""
    ids = torch.from_numpy(tokenizer([init]))[0]
    end = (ids == tokenizer.end_id).nonzero()[0, 0] if tokenizer.end_id is not None else len(ids)
    found = ids[1:end]
    if len(found) != n_ctx:
        raise ConfigError(f"finetune.init={init!r} is {len(found)} tokens, finetune.n_ctx={n_ctx}: give as many")
    return words.weight.detach()[found].float().clone()
