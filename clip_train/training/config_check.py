"""Values of the config that cannot be used, said before anything is opened or written."""

from numbers import Real

from omegaconf import DictConfig, OmegaConf

from clip_train.errors import ConfigError
from clip_train.training.launch import World

# Key, type, least value.
_NUMBERS: tuple[tuple[str, type, float], ...] = (
    ("batch_size", int, 1),
    ("micro_batch_size", int, 1),
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
_MAY_BE = {"optim.grad_clip": (None,), "micro_batch_size": (None, "auto")}
_CHOICES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("trainer.precision", ("32", "bf16-mixed", "16-mixed", "bf16-true")),
    ("trainer.strategy", ("auto", "ddp")),
    ("loss.exchange", ("gather", "ring")),
    ("loss.matmul_dtype", ("null", "bfloat16", "float16")),
)


def check_config(cfg: DictConfig, world: World) -> None:
    """Raises ConfigError for a value that is missing, of the wrong kind, out of range, or contradicts the world."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: give {missing[0]}=...")
    for key, kind, least in _NUMBERS:
        value = OmegaConf.select(cfg, key)
        if key in _MAY_BE and value in _MAY_BE[key]:
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or value is None or not value >= least:
            name = "whole number" if kind is int else "number"
            raise ConfigError(f"{key}={value} is not a {name} of at least {least:g}")
    for key, choices in _CHOICES:
        value = OmegaConf.select(cfg, key, default=choices[0])
        if ("null" if value is None else str(value)) not in choices:
            raise ConfigError(f"{key}={value} is none of {', '.join(choices)}")
    _check_logit_bias(cfg)
    if rest := cfg.batch_size % world.size:
        below, above = cfg.batch_size - rest, cfg.batch_size - rest + world.size
        nearest = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"batch_size={cfg.batch_size} does not divide over {world.size} processes; the nearest that do: {nearest}"
        )


def _check_logit_bias(cfg: DictConfig) -> None:
    loss, bias = str(cfg.loss._target_).rpartition(".")[2], cfg.model.init_logit_bias
    if loss == "sigmoid_loss" and bias is None:
        raise ConfigError("loss=sigmoid learns a bias: give model.init_logit_bias a number, such as -10")
    if loss == "contrastive_loss" and bias is not None:
        raise ConfigError(f"model.init_logit_bias={bias}: loss=contrastive has no bias, it would cancel; leave it null")
