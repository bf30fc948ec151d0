"""The tokenizer that a model was trained with, as files that transformers reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_train.data.hf_tokenizer import load_tokenizer
from clip_train.data.tokenizer import byte_pair_vocabulary
from clip_train.models.text_config import TextConfig

_SPECIAL_TOKENS = ["<|startoftext|>", "<|endoftext|>"]  # as transformers calls them


def write_tokenizer(text: Mapping[str, Any], folder: Path) -> None:
    """Write it into a folder.

    Args:
        text: the `model.text` config.
        folder: which exists.

    Raises:
        ConfigError: it is one of transformers, and not here.
    """
    name = TextConfig.of(text).tokenizer_name
    tokenizer = _clip_tokenizer(text["context_length"]) if name == "clip" else load_tokenizer(name)
    tokenizer.model_max_length = text["context_length"]
    tokenizer.save_pretrained(folder)


def _clip_tokenizer(context_length: int) -> Any:
    from transformers import CLIPTokenizer

    words, merges = byte_pair_vocabulary()
    vocabulary = {word: number for number, word in enumerate([*words[:-2], *_SPECIAL_TOKENS])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)  # pyright: ignore
