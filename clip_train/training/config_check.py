"""Values of the config that cannot be used, said before anything is opened or written."""

import math
from numbers import Real

from omegaconf import DictConfig, OmegaConf

from clip_train.data.preprocessing import INTERPOLATIONS, RESIZE_MODES
from clip_train.data.tokenizer import LONG_CAPTIONS
from clip_train.errors import ConfigError
from clip_train.models.activation_checkpointing import NONE, checkpointing_mode
from clip_train.models.adaptation import classifies
from clip_train.models.compiling import CUDA_GRAPHS, WITHOUT_GRAPHS, check_compiler, compile_mode
from clip_train.models.dual_encoder import INITIAL_LOGIT_SCALE
from clip_train.training.launch import World
from clip_train.training.optim.optimizer import ADAMW_STATES, OPTIMIZERS, TOWERS
from clip_train.training.optim.schedule import COOLDOWN_SHAPES, SHAPES

# Key, type, least value.
_NUMBERS: tuple[tuple[str, type, float], ...] = (
    ("batch_size", int, 1),
    ("micro_batch_size", int, 1),
    ("seed", int, 0),
    ("data.lanes", int, 1),
    ("data.shuffle_window", int, 1),
    ("data.max_bad_fraction", Real, 0),
    ("data.max_image_pixels", int, 1),
    ("data.word_dropout", Real, 0),
    ("data.retries", int, 0),
    ("data.timeout", Real, 0),
    ("model.image_size", int, 1),
    ("model.embed_dim", int, 1),
    ("model.text.context_length", int, 2),
    ("model.text.length_multiple", int, 1),
    ("model.init_logit_scale", Real, 0),
    ("model.init_logit_bias", Real, -math.inf),
    ("optim.lr", Real, 0),
    ("optim.weight_decay", Real, 0),
    ("optim.eps", Real, 0),
    ("optim.momentum", Real, 0),
    ("optim.grad_clip", Real, 0),
    ("optim.vision.lr", Real, 0),
    ("optim.vision.weight_decay", Real, 0),
    ("optim.vision.layer_decay", Real, 0),
    ("optim.text.lr", Real, 0),
    ("optim.text.weight_decay", Real, 0),
    ("optim.text.layer_decay", Real, 0),
    ("optim.fallback.lr_scale", Real, 0),
    ("optim.fallback.eps", Real, 0),
    ("finetune.unlocked_groups", int, 0),
    ("finetune.rank", int, 1),
    ("finetune.alpha", Real, 0),
    ("finetune.dropout", Real, 0),
    ("finetune.ratio", Real, 0),
    ("finetune.reduction", int, 1),
    ("finetune.n_ctx", int, 1),
    ("schedule.end_factor", Real, 0),
    ("schedule.cooldown_power", Real, 0),
    ("schedule.period_factor", Real, 1),
    ("ema.decay", Real, 0),
    ("distill.loss_weight", Real, 0),
    ("trainer.log_every", int, 1),
    ("trainer.profile", int, 1),
    ("trainer.ddp.bucket_cap_mb", Real, 0),
    ("checkpoint.keep", int, 1),
    ("checkpoint.keep_best", int, 1),
    ("checkpoint.every_minutes", Real, 0),
    ("loss.contrastive_weight", Real, 0),
    ("loss.caption_weight", Real, 0),
    ("guard.max_bad_steps", int, 1),
    ("guard.max_rollbacks", int, 0),
    ("guard.spike.deviations", Real, 0),
    ("guard.spike.window", int, 2),
    ("guard.logit_scale.steps_at_limit", int, 1),
    ("guard.logit_scale.least", Real, 0),
    ("eval.batch_size", int, 1),
)
_MAY_BE = {
    "checkpoint.every_minutes": (None,),
    "guard.spike.deviations": (None,),
    "guard.logit_scale.steps_at_limit": (None,),
    "guard.logit_scale.least": (None,),
    "optim.grad_clip": (None,),
    **{f"optim.{tower}.{key}": (None,) for tower in TOWERS for key in ("lr", "weight_decay", "layer_decay")},
    "ema.decay": (None,),
    "micro_batch_size": (None, "auto"),
    "model.init_logit_bias": (None,),
    "model.text.length_multiple": (None,),
    "trainer.profile": (None,),
    "trainer.ddp.bucket_cap_mb": (None,),
}
# Shares, which are at most 1.
_SHARES = (
    "data.word_dropout",
    "optim.vision.layer_decay",
    "optim.text.layer_decay",
    "schedule.end_factor",
    "finetune.dropout",
    "finetune.ratio",
    "ema.decay",
)
# What some choices of these groups have and others have not, or a config of before there were any.
_OPTIONAL = (
    "optim.eps",
    "optim.momentum",
    "optim.vision.",
    "optim.text.",
    "optim.fallback.",
    "schedule.",
    "ema.",
    "distill.",
    "loss.",
    "finetune.",
    "trainer.ddp.",
)
# What a model config of the user's need not have.
_DEFAULTS = {"model.init_logit_scale": INITIAL_LOGIT_SCALE, "model.text.length_multiple": None}
_ABSENT = object()
# The functions of the loss group, by its choices.
_LOSSES = {"contrastive_loss": "contrastive", "sigmoid_loss": "sigmoid", "CaptioningLoss": "captioning"}
_LN_100 = math.log(100)
_CHOICES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("trainer.precision", ("32", "bf16-mixed", "16-mixed", "bf16-true")),
    ("trainer.strategy", ("auto", "ddp", "fsdp")),
    ("checkpoint.best_mode", ("max", "min")),
    ("optim.name", tuple(OPTIMIZERS)),
    ("optim.state", tuple(ADAMW_STATES)),
    ("schedule.name", tuple(SHAPES)),
    ("schedule.cooldown_shape", COOLDOWN_SHAPES),
    ("data.decode", ("fast", "exact")),
    ("data.long_captions", LONG_CAPTIONS),
    ("data.val.resize_mode", RESIZE_MODES),
    ("data.val.interpolation", tuple(INTERPOLATIONS)),
)
_LOSS_CHOICES = (
    ("loss.exchange", ("gather", "ring")),
    ("loss.matmul_dtype", ("null", "bfloat16", "float16")),
)


def check_config(cfg: DictConfig, world: World, runs_here: bool = True) -> None:
    """Look at all values.

    Args:
        runs_here: also look for what the config needs of this machine; false for a run that is only planned.

    Raises:
        ConfigError: a value is missing, of the wrong kind, out of range, or contradicts the world.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: give {missing[0]}=...")
    for key, kind, least in _NUMBERS:
        value = OmegaConf.select(cfg, key, default=_DEFAULTS.get(key, _ABSENT))
        if value is _ABSENT and key.startswith(_OPTIONAL):
            continue
        if key in _MAY_BE and value in _MAY_BE[key]:
            continue
        if isinstance(value, bool) or not isinstance(value, kind) or value is None or not value >= least:
            name = "whole number" if kind is int else "number"
            others = "".join(f", nor {'null' if other is None else other}" for other in _MAY_BE.get(key, ()))
            raise ConfigError(f"{key}={value} is not a {name} of at least {least:g}{others}")
    ours = str(cfg.loss._target_).startswith("clip_train.losses.")
    for key, choices in _CHOICES + (_LOSS_CHOICES if ours else ()):
        value = OmegaConf.select(cfg, key, default=choices[0])
        if ("null" if value is None else str(value)) not in choices:
            raise ConfigError(f"{key}={value} is none of {', '.join(choices)}")
    for key in _SHARES:
        if (OmegaConf.select(cfg, key) or 0) > 1:
            raise ConfigError(f"{key}={OmegaConf.select(cfg, key)} is a share: give at most 1")
    if cfg.get("init_from_ema") and not cfg.init_from:
        raise ConfigError("init_from_ema=true says nothing without init_from: give init_from=CHECKPOINT")
    _check_logits(cfg)
    _check_decoder(cfg)
    _check_finetune(cfg)
    if cfg.get("distill") is not None and cfg.micro_batch_size == "auto":
        raise ConfigError("micro_batch_size=auto does not try with a teacher (distill): give a number or null")
    if str(cfg.trainer.precision) == "bf16-true" and cfg.optim.get("state") == "bf16":
        raise ConfigError(
            "optim.state=bf16 says nothing with trainer.precision=bf16-true, whose state is in bf16: leave it"
        )
    _check_float8(cfg)
    _check_fsdp(cfg)
    _check_compile(cfg, world)
    if runs_here:
        _check_compiler(cfg)
    if rest := cfg.batch_size % world.size:
        below, above = cfg.batch_size - rest, cfg.batch_size - rest + world.size
        nearest = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"batch_size={cfg.batch_size} does not divide over {world.size} processes; the nearest that do: {nearest}"
        )


def _check_float8(cfg: DictConfig) -> None:
    """What does not depend on the machine; `models/float8.py` looks at the GPU."""
    wanted, trainer = cfg.trainer.get("float8", False), cfg.trainer
    if wanted not in (True, False):
        raise ConfigError(f"trainer.float8={wanted} is neither true nor false")
    if wanted and not str(trainer.precision).startswith("bf16"):
        raise ConfigError(f"trainer.float8=true goes with trainer.precision=bf16-mixed, not {trainer.precision}")
    if wanted and trainer.accelerator == "cpu":
        raise ConfigError("trainer.float8=true needs a GPU, not trainer.accelerator=cpu: leave it out")


def _check_fsdp(cfg: DictConfig) -> None:
    offload = OmegaConf.select(cfg, "trainer.fsdp.cpu_offload", default=False)
    if offload not in (True, False):
        raise ConfigError(f"trainer.fsdp.cpu_offload={offload} is neither true nor false")
    if cfg.trainer.strategy != "fsdp":
        if offload:
            raise ConfigError("trainer.fsdp.cpu_offload=true is for trainer.strategy=fsdp: take that, or leave it out")
        return
    if (cap := OmegaConf.select(cfg, "trainer.ddp.bucket_cap_mb")) is not None:
        raise ConfigError(f"trainer.ddp.bucket_cap_mb={cap} is for trainer.strategy=ddp, not fsdp: leave it null")
    if cfg.micro_batch_size == "auto":
        raise ConfigError("micro_batch_size=auto does not try with trainer.strategy=fsdp: give a number, or take ddp")
    if cfg.trainer.precision == "16-mixed":
        raise ConfigError("trainer.precision=16-mixed does not go with trainer.strategy=fsdp: take bf16-mixed or 32")
    if cfg.optim.get("state") == "8bit":
        raise ConfigError("optim.state=8bit does not go with trainer.strategy=fsdp: take optim.state=bf16, or ddp")
    if not OPTIMIZERS[name := cfg.optim.get("name", "adamw")].can_shard:
        others = ", ".join(other for other, kind in OPTIMIZERS.items() if kind.can_shard)
        raise ConfigError(f"optim={name} needs whole matrices, not trainer.strategy=fsdp: take ddp, or one of {others}")


def _check_compile(cfg: DictConfig, world: World) -> None:
    mode = compile_mode(cfg.trainer.get("compile", False))
    if mode in CUDA_GRAPHS:
        _check_graphs(cfg, world, mode)


def _check_compiler(cfg: DictConfig) -> None:
    if cfg.trainer.get("compile", False):
        check_compiler(f"trainer.compile={cfg.trainer.compile}", "give trainer.compile=false")
    if cfg.optim.get("state") == "8bit":  # torchao's step is compiled
        check_compiler("optim.state=8bit", "give optim.state=bf16")


def _check_graphs(cfg: DictConfig, world: World, mode: str) -> None:
    if world.accelerator != "gpu":
        raise ConfigError(f"trainer.compile={mode} makes CUDA graphs, which need a GPU: take true")
    checkpointing = checkpointing_mode(cfg.model.get("grad_checkpointing", NONE))
    # Weights that are gathered anew lie elsewhere; what is encoded again in backward overwrites what backward reads.
    for key, value, bad in (
        ("trainer.strategy", "fsdp", cfg.trainer.strategy == "fsdp"),
        ("micro_batch_size", cfg.micro_batch_size, cfg.micro_batch_size is not None),
        ("model.grad_checkpointing", checkpointing, checkpointing != NONE),
    ):
        if bad:
            raise ConfigError(
                f"trainer.compile={mode} makes CUDA graphs, which do not hold with {key}={value}:"
                f" take trainer.compile={WITHOUT_GRAPHS[mode]}"
            )


def _check_logits(cfg: DictConfig) -> None:
    scale, bias = cfg.model.get("init_logit_scale", 0), cfg.model.get("init_logit_bias")
    if scale > _LN_100:
        raise ConfigError(f"model.init_logit_scale={scale:g} is above ln 100: it is the log of the scale")
    loss = _loss(cfg)
    if loss == "sigmoid" and bias is None:
        raise ConfigError("loss=sigmoid learns a bias: give model.init_logit_bias a number, such as -10")
    if loss in ("contrastive", "captioning") and bias is not None:
        raise ConfigError(
            f"model.init_logit_bias={bias}: loss={loss} has no bias, it would cancel;"
            " leave it null, or take loss=sigmoid"
        )


def _check_finetune(cfg: DictConfig) -> None:
    if not classifies(cfg.get("finetune")):
        return
    if cfg.model.get("decoder") is not None:
        raise ConfigError(f"finetune={cfg.finetune.method} goes with a model of two towers: give model.decoder=null")


def _check_decoder(cfg: DictConfig) -> None:
    loss = _loss(cfg)
    decoder = cfg.model.get("decoder") is not None
    if loss == "captioning" and not decoder:
        raise ConfigError("loss=captioning trains a decoder, and this model has none: take model=coca_vit_b_32 or so")
    if loss in ("contrastive", "sigmoid") and decoder:
        raise ConfigError(
            f"loss={loss} trains no decoder, and this model has one: take loss=captioning, or model.decoder=null"
        )


def _loss(cfg: DictConfig) -> str | None:
    """The choice of the loss group; None for a loss of the user's."""
    return _LOSSES.get(str(cfg.loss._target_).rpartition(".")[2])
