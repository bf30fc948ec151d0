"""Captions from a decoder: beam search and sampling, by transformers' `generate`."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from clip_train.errors import ConfigError
from clip_train.models.captioner import Captioner, Pixels

GENERATION_TYPES = ("beam_search", "top_p", "top_k")


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """How captions are chosen; open_clip's and transformers' names.

    Attributes:
        generation_type: `beam_search`; `top_p`, which draws from the fewest words that have that much probability
            together; or `top_k`, which draws from the k most probable ones.
        num_beams: of beam search; 1 always takes the most probable word.
        length_penalty: of beam search: a caption's log-probability is divided by its length to this power.
        top_p, top_k: of the other two.
        temperature: of these: above 1 more varied, below 1 more predictable.
        min_length, max_length: of a caption in tokens, start and end included.
        repetition_penalty: above 1 makes words that were used before less probable.
        seed: of what is drawn.

    Raises:
        ConfigError: a value is out of range.
    """

    generation_type: str = "beam_search"
    num_beams: int = 6
    length_penalty: float = 1.0
    top_p: float = 0.9
    top_k: int = 50
    temperature: float = 1.0
    min_length: int = 5
    max_length: int = 30
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = {
            f"generation_type={self.generation_type} is none of {', '.join(GENERATION_TYPES)}": (
                self.generation_type not in GENERATION_TYPES
            ),
            f"num_beams={self.num_beams}: give at least 1": self.num_beams < 1,
            f"top_p={self.top_p} is a share: give more than 0 and at most 1": not 0 < self.top_p <= 1,
            f"top_k={self.top_k}: give at least 1": self.top_k < 1,
            f"temperature={self.temperature}: give more than 0": not self.temperature > 0,
            f"min_length={self.min_length}: give at least 0": self.min_length < 0,
            f"max_length={self.max_length}: give more than min_length={self.min_length}, and at least 2": (
                self.max_length <= max(self.min_length, 1)
            ),
            f"repetition_penalty={self.repetition_penalty}: give more than 0": not self.repetition_penalty > 0,
            f"seed={self.seed}: give at least 0": self.seed < 0,
        }
        if reason := next((reason for reason, true in wrong.items() if true), None):
            raise ConfigError(reason)

    def as_generation_config(self, **tokens: int) -> GenerationConfig:
        """For transformers."""
        chosen: dict[str, Any] = {"top_k": 0, "top_p": 1.0}  # else it takes the 50 most probable
        if self.generation_type == "beam_search":
            chosen = {"num_beams": self.num_beams, "length_penalty": self.length_penalty}
        else:
            chosen |= {"do_sample": True, self.generation_type: getattr(self, self.generation_type)}
            chosen |= {"temperature": self.temperature}
        return GenerationConfig(
            **chosen,
            **tokens,
            min_length=self.min_length,
            max_length=self.max_length,
            repetition_penalty=self.repetition_penalty,
            use_cache=False,
        )


@torch.no_grad()
def generate(model: Captioner, pixels: Pixels, options: CaptionOptions) -> Int64[Tensor, "b length"]:
    """Captions of images, as rows of token ids: start, words, end, padding.

    Args:
        model: in evaluation mode.
        pixels: of the images; uint8, or normalised.
        options: what is drawn depends on the seed and on the images that are given together.

    Raises:
        ConfigError: the captions are to be longer than the model's texts.
    """
    if options.max_length > model.text.context_length:
        raise ConfigError(
            f"max_length={options.max_length}: the model's texts have at most {model.text.context_length} tokens"
        )
    image_tokens = model.encode_image_tokens(pixels)
    start = torch.full((len(image_tokens), 1), model.text.start_id, device=image_tokens.device)
    tokens = {"bos_token_id": model.text.start_id, "eos_token_id": model.text.end_id, "pad_token_id": model.text.pad_id}
    with torch.random.fork_rng([image_tokens.device] if image_tokens.is_cuda else []):
        torch.manual_seed(options.seed)
        return _Writer(model).generate(  # pyright: ignore[reportAttributeAccessIssue]
            start,
            attention_mask=torch.ones_like(start),
            image_tokens=image_tokens,
            generation_config=options.as_generation_config(**tokens),
        )


class _WriterConfig(PretrainedConfig):
    model_type = "clip_train_captioner"


class _Writer(PreTrainedModel, GenerationMixin):
    """A captioner as `GenerationMixin` wants a model of language: the next token after each beginning."""

    config_class = _WriterConfig
    main_input_name = "input_ids"

    def __init__(self, model: Captioner) -> None:
        super().__init__(_WriterConfig(vocab_size=model.text.vocab_size))  # pyright: ignore[reportCallIssue]
        self.captioner = model

    def forward(
        self,
        input_ids: Int64[Tensor, "b length"],
        image_tokens: Float[Tensor, "b tokens width"],
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        logits = self.captioner.next_token_logits(image_tokens, input_ids, last=1)
        return CausalLMOutput(logits=logits)  # pyright: ignore[reportArgumentType]
