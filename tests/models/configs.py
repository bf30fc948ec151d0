"""The model configs, composed as the command line does."""

from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from clip_train.commands.program import config_dir


def load_config(name: str, *overrides: str) -> dict[str, Any]:
    """The keys of `model=NAME`, with other overrides such as `model.image_size=32`."""
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("train", ["experiment=demo", f"model={name}", *overrides])
    return OmegaConf.to_container(cfg.model, resolve=True)  # pyright: ignore[reportReturnType]
