"""What a run is put together from, each made from its part of the config."""

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from clip_train.checkpoints.writer import CheckpointWriter
from clip_train.data.tokenizer_choice import CaptionTokenizer, choose_tokenizer
from clip_train.errors import ConfigError
from clip_train.losses.classification import ClassificationLoss
from clip_train.models import DualEncoder, create_dual_encoder
from clip_train.models.adaptation import classifies
from clip_train.models.compiling import compile_blocks, compile_mode
from clip_train.models.dual_encoder import AnyTextTower
from clip_train.models.float8 import check_float8, use_float8
from clip_train.models.text_config import TextConfig
from clip_train.training.callbacks.checkpointing import FolderCheckpointIO
from clip_train.training.data_module import ClipDataModule
from clip_train.training.distillation import Teacher, open_teacher
from clip_train.training.durations import Clock
from clip_train.training.launch import World
from clip_train.training.loggers.run_logger import RunLogger
from clip_train.training.module import ClipModule
from clip_train.training.run_folder import RunFolder
from clip_train.training.signals import keep_handlers
from clip_train.training.strategy import make_strategy

log = logging.getLogger(__name__)


def make_model(cfg: DictConfig) -> DualEncoder:
    """The model with random weights, or those of its `pretrained` towers."""
    model = create_dual_encoder(**plain(cfg.model))
    multiple = OmegaConf.select(cfg, "model.text.length_multiple")
    if multiple is not None and getattr(model.text, "length_multiple", None) is None:
        log.info(
            "model.text.length_multiple=%s says nothing: this text tower takes its texts with their padding", multiple
        )
    return model


def make_module(cfg: DictConfig, clock: Clock, model: Any, adapter_only: bool = False) -> ClipModule:
    """The model, ready to be trained, and how it is trained."""
    if cfg.trainer.get("float8"):
        _convert_to_float8(model)
    micro_batch_size = None if cfg.micro_batch_size == "auto" else cfg.micro_batch_size
    optim, schedule, loss = plain(cfg.optim), plain(cfg.schedule), make_loss(cfg)
    teacher = make_teacher(cfg, model.batch_keys)
    if mode := compile_mode(cfg.trainer.get("compile", False)):
        compile_blocks(model, mode)
    return ClipModule(model, loss, optim, clock, cfg.seed, micro_batch_size, schedule, adapter_only, teacher)


def _convert_to_float8(model: Any) -> None:
    """Raises ConfigError if the GPU has no float8, or nothing in the model would use it."""
    check_float8()
    log.info("trainer.float8: %d linear layers compute in float8", len(use_float8(model)))


def make_teacher(cfg: DictConfig, batch_keys: Sequence[str]) -> Teacher | None:
    """The model that `distill` says to learn from. Raises ConfigError if the student is not trained on pairs."""
    if cfg.get("distill") is None:
        return None
    if tuple(batch_keys) != ("image", "text"):
        raise ConfigError(
            f"distill compares pictures with texts, finetune={cfg.finetune.method} takes {' and '.join(batch_keys)}:"
            " leave one of them out"
        )
    return open_teacher(plain(cfg.distill), plain(cfg.model), _matmul_dtype(cfg))


def open_data(cfg: DictConfig, world: World) -> ClipDataModule:
    """The training stream and the validation sets."""
    text = TextConfig.of(plain(cfg.model.text))
    return ClipDataModule(
        plain(cfg.data),
        image_size=cfg.model.image_size,
        tokenizer=choose_tokenizer(text.tokenizer_name, text.context_length, cfg.data.long_captions, text.clean),
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        world=world,
        zero_shot=plain(cfg.eval).get("zero_shot"),
    )


def check_tokenizer(tokenizer: CaptionTokenizer, text: AnyTextTower) -> None:
    """Raises ConfigError if the text tower cannot take the tokenizer's ids, or takes them for something else."""
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"model.text.tokenizer has {tokenizer.vocab_size:,} ids and the text tower {text.vocab_size:,}:"
            " give the tokenizer that goes with the tower, or model.text.vocab_size"
        )
    for what, ours, theirs in (
        ("pads with", tokenizer.pad_id, text.pad_id),
        ("ends with", tokenizer.end_id, text.end_id),
    ):
        if theirs is not None and ours != theirs:
            raise ConfigError(
                f"model.text.tokenizer {what} id {ours}, the text tower expects {theirs}:"
                " give the tokenizer that goes with the tower"
            )


def make_loss(cfg: DictConfig) -> Callable[..., Tensor]:
    """The loss group's function, with the name of a dtype turned into the dtype; another where labels are learned."""
    if classifies(cfg.get("finetune")):
        return ClassificationLoss()
    dtype = _matmul_dtype(cfg)
    return instantiate(cfg.loss) if dtype is None else instantiate(cfg.loss, matmul_dtype=dtype)


def _matmul_dtype(cfg: DictConfig) -> torch.dtype | None:
    name = OmegaConf.select(cfg, "loss.matmul_dtype")
    return None if name is None else getattr(torch, name)


def _precision(cfg: DictConfig, world: World) -> str:
    """What to compute in: a processor without bf16 instructions takes fp32, which is some 50 times as fast there."""
    precision = str(cfg.trainer.precision)
    if precision == "bf16-mixed" and world.accelerator == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.warning("this processor has no instructions for bf16: computing in fp32")
        return "32"
    return precision


def make_loggers(cfg: DictConfig, folder: RunFolder, writer: CheckpointWriter) -> list[Logger]:
    """The loggers of the config, told of every checkpoint that is saved."""
    loggers = [instantiate(logger, save_dir=str(folder.path)) for logger in (cfg.logger or {}).values()]
    writer.on_saved = [partial(_tell_loggers, loggers, writer)]
    return loggers


def _tell_loggers(loggers: list[Logger], writer: CheckpointWriter, checkpoint: Path) -> None:
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.checkpoint_saved(checkpoint, writer.is_best(checkpoint))


def make_trainer(
    cfg: DictConfig,
    world: World,
    folder: RunFolder,
    model: DualEncoder,
    callbacks: list[L.Callback],
    loggers: list[Logger],
) -> L.Trainer:
    """Lightning's Trainer, with all of its own checkpointing, progress and signal handling off."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # advice on settings that are ours
    trainer = L.Trainer(
        accelerator=world.accelerator,
        devices=world.devices,
        num_nodes=world.num_nodes,
        strategy=make_strategy(cfg, world, model),
        precision=cast(Any, _precision(cfg, world)),
        plugins=[world.environment, FolderCheckpointIO()],
        callbacks=callbacks,
        logger=loggers,
        max_epochs=-1,  # the module ends the run when `samples_seen` reaches its length
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder.path),
    )
    keep_handlers(trainer)
    return trainer


def plain(cfg: Any) -> Any:
    """A part of the config as plain Python values."""
    return OmegaConf.to_container(cfg, resolve=True)
