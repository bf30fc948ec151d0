"""Values of the config that cannot be used, said before anything is opened or written."""

from numbers import Real

from omegaconf import DictConfig, OmegaConf

from clip_train.errors import ConfigError
from clip_train.training.launch import World

PRECISIONS = ("32", "bf16-mixed", "16-mixed", "bf16-true")
STRATEGIES = ("auto", "ddp")

# Key, type, least value.
_NUMBERS: tuple[tuple[str, type, float], ...] = (
    ("batch_size", int, 1),
    ("seed", int, 0),
    ("data.lanes", int, 1),
    ("data.shuffle_window", int, 1),
    ("data.max_bad_fraction", Real, 0),
    ("model.image_size", int, 1),
    ("model.embed_dim", int, 1),
    ("model.text.context_length", int, 2),
    ("optim.lr", Real, 0),
    ("optim.weight_decay", Real, 0),
    ("optim.eps", Real, 0),
    ("optim.grad_clip", Real, 0),
    ("trainer.log_every", int, 1),
    ("checkpoint.keep", int, 1),
    ("eval.batch_size", int, 1),
)
_MAY_BE_NULL = ("optim.grad_clip",)


def check_config(cfg: DictConfig, world: World) -> None:
    """Raises ConfigError for a value that is missing, of the wrong kind, out of range, or contradicts the world."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: give {missing[0]}=...")
    for key, kind, least in _NUMBERS:
        value = OmegaConf.select(cfg, key)
        if value is None and key in _MAY_BE_NULL:
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or value is None or not value >= least:
            name = "whole number" if kind is int else "number"
            raise ConfigError(f"{key}={value} is not a {name} of at least {least:g}")
    for key, choices in (("trainer.precision", PRECISIONS), ("trainer.strategy", STRATEGIES)):
        if str(OmegaConf.select(cfg, key)) not in choices:
            raise ConfigError(f"{key}={OmegaConf.select(cfg, key)} is none of {', '.join(choices)}")
    if rest := cfg.batch_size % world.size:
        below, above = cfg.batch_size - rest, cfg.batch_size - rest + world.size
        nearest = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"batch_size={cfg.batch_size} does not divide over {world.size} processes; the nearest that do: {nearest}"
        )
