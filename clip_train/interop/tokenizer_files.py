"""The tokenizer that a model was trained with, as files that transformers reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_train.data.tokenizer import byte_pair_vocabulary
from clip_train.errors import ConfigError

_SPECIAL_TOKENS = ["<|startoftext|>", "<|endoftext|>"]  # as transformers calls them


def tokenizer_name(text: Mapping[str, Any]) -> str:
    """`clip`, or a name or folder of transformers.

    Args:
        text: the `model.text` config.
    """
    return text.get("tokenizer") or text.get("name") or "clip"


def write_tokenizer(text: Mapping[str, Any], folder: Path) -> None:
    """Write it into a folder.

    Args:
        text: the `model.text` config.
        folder: which exists.

    Raises:
        ConfigError: it is one of transformers, and not here.
    """
    name = tokenizer_name(text)
    tokenizer = _clip_tokenizer(text["context_length"]) if name == "clip" else _tokenizer_of_transformers(name)
    tokenizer.model_max_length = text["context_length"]
    tokenizer.save_pretrained(folder)


def _clip_tokenizer(context_length: int) -> Any:
    from transformers import CLIPTokenizer

    words, merges = byte_pair_vocabulary()
    vocabulary = {word: number for number, word in enumerate([*words[:-2], *_SPECIAL_TOKENS])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)  # pyright: ignore


def _tokenizer_of_transformers(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.text.tokenizer={name}: in no folder and no cache, and cannot be downloaded;"
            " give the folder of the tokenizer"
        ) from error
