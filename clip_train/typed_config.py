"""Parts of the config as dataclasses, their types checked."""

from dataclasses import fields
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from clip_train.errors import ConfigError

Options = TypeVar("Options")


def typed(kind: type[Options], cfg: DictConfig, setting: str = "") -> Options:
    """The dataclass `kind` from the config's keys of the same names.

    Args:
        setting: where that part of the config is, for errors.

    Raises:
        ConfigError: a key has no value, or one of the wrong type.
    """
    prefix = f"{setting}." if setting else ""
    try:
        own = {field.name: cfg[field.name] for field in fields(kind)}  # type: ignore[arg-type]
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), own))  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value: give {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{prefix}{error.full_key}: {str(error).splitlines()[0]}") from error
