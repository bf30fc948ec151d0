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
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from clip_train.checkpoints.mirror import Mirror
from clip_train.checkpoints.retention import Retention
from clip_train.checkpoints.writer import CheckpointWriter
from clip_train.data.tokenizer import VOCAB_SIZE
from clip_train.models import DualEncoder
from clip_train.training.bad_samples import BadSamples
from clip_train.training.cached_gradients import refuse_batch_norm
from clip_train.training.checkpointing import Checkpointing, FolderCheckpointIO
from clip_train.training.data_module import ClipDataModule
from clip_train.training.durations import Clock, seconds_of
from clip_train.training.guard import Guard, RollBack
from clip_train.training.guard_report import write_report
from clip_train.training.health import Health
from clip_train.training.launch import World, cpus_per_process
from clip_train.training.loader_times import LoaderTimes
from clip_train.training.metrics import TrainMetrics
from clip_train.training.micro_batch import MicroBatchSearch
from clip_train.training.resume import Checkpoint
from clip_train.training.run_folder import RunFolder, environment
from clip_train.training.run_logger import RunLogger
from clip_train.training.shard_staging import ShardStaging
from clip_train.training.signals import keep_handlers
from clip_train.training.trial_report import TrialReport
from clip_train.training.validation import AfterEvaluation, Validation, check_best_metric
from clip_train.training.watchdog import Watchdog, group_timeout

log = logging.getLogger(__name__)


def make_metrics(
    cfg: DictConfig, world: World, data: ClipDataModule, bad_samples: BadSamples, staging: ShardStaging, guard: Guard
) -> TrainMetrics:
    """Metrics of steps, data and loader."""
    return TrainMetrics(
        cfg.trainer.log_every,
        cfg.batch_size,
        data_metrics=lambda position: {**bad_samples.metrics(), **staging.metrics(), **data.metrics(position)},
        loader_times=LoaderTimes(data.num_workers, cpus_per_process(world), cfg.data.decode),
        guard=guard,
    )


def make_guard(
    cfg: DictConfig,
    folder: RunFolder,
    data: ClipDataModule,
    last_checkpoint: Callable[[], tuple[Path, int] | None],
    undone: RollBack | None,
) -> Guard:
    """The guard, which reports into the run's folder."""
    settings = cfg.guard
    return Guard(
        max_bad_steps=settings.max_bad_steps,
        max_rollbacks=settings.max_rollbacks,
        health=Health(
            spike_window=settings.spike.window,
            spike_deviations=settings.spike.deviations,
            scale_steps=settings.logit_scale.steps_at_limit,
            least_scale=settings.logit_scale.least,
        ),
        last_checkpoint=last_checkpoint,
        report=partial(write_report, folder.path / "guard_report.json", batches=data.batches, config=plain(cfg)),
        undone=undone,
    )


def open_data(cfg: DictConfig, world: World) -> ClipDataModule:
    """The training stream and the validation sets."""
    return ClipDataModule(
        plain(cfg.data),
        image_size=cfg.model.image_size,
        context_length=cfg.model.text.context_length,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        world=world,
    )


def make_loss(cfg: DictConfig) -> Callable[..., Tensor]:
    """The loss group's function, with the name of a dtype turned into the dtype."""
    name = OmegaConf.select(cfg, "loss.matmul_dtype")
    return instantiate(cfg.loss) if name is None else partial(instantiate(cfg.loss), matmul_dtype=getattr(torch, name))


def make_micro_batch_search(cfg: DictConfig, model: DualEncoder, world: World) -> MicroBatchSearch:
    """The search for `micro_batch_size=auto`."""
    refuse_batch_norm(model)
    local_batch = cfg.batch_size // world.size
    return MicroBatchSearch(local_batch, cfg.model.image_size, cfg.model.text.context_length, VOCAB_SIZE, world.devices)


def make_checkpointing(
    cfg: DictConfig,
    world: World,
    folder: RunFolder,
    data: ClipDataModule,
    clock: Clock,
    resumed_from: Checkpoint | None,
    metrics: TrainMetrics,
) -> Checkpointing:
    """When to save, what to keep, and what a manifest says."""
    settings = cfg.checkpoint
    check_best_metric(settings.best_metric, data.val_sets)
    retention = Retention(settings.keep, settings.keep_best, settings.best_metric, settings.best_mode)
    mirror = Mirror(settings.mirror) if settings.mirror else None
    return Checkpointing(
        CheckpointWriter(folder.checkpoints, retention, rank=world.rank, mirror=mirror),
        every_samples=clock.cadence(settings.every, "checkpoint.every"),
        every_minutes=settings.every_minutes,
        milestone_samples=clock.cadence(settings.milestones, "checkpoint.milestones"),
        asynchronous=settings.asynchronous,
        resumed_from=resumed_from.path if resumed_from else None,
        about=lambda: {
            "run_name": cfg.run_name,
            "world_size": world.size,
            "config": plain(cfg),
            "data": data.describe_data(),
            "environment": environment(),
            "wandb_run_id": folder.wandb_run_id,
        },
        metrics=metrics,
    )


def make_validation(
    cfg: DictConfig,
    folder: RunFolder,
    data: ClipDataModule,
    clock: Clock,
    metrics: TrainMetrics,
    after: Sequence[AfterEvaluation],
) -> Validation:
    """Evaluation during training and at its end."""
    return Validation(
        data.val_sets,
        every_samples=clock.cadence(cfg.eval.every, "eval.every"),
        batch_size=cfg.eval.batch_size,
        num_workers=data.num_workers,
        picture=folder.path / "retrieval.png" if cfg.eval.picture else None,
        metrics=metrics,
        after=after,
    )


def _timeouts(cfg: DictConfig) -> tuple[float | None, float]:
    """Seconds without a sign of life that are too many, for any step and for the first one."""
    later, first = cfg.guard.timeout, seconds_of(cfg.guard.first_step_timeout, "guard.first_step_timeout")
    return None if later is None else seconds_of(later, "guard.timeout"), first


def make_trial_report(
    cfg: DictConfig, folder: RunFolder, world: World, clock: Clock, metrics: TrainMetrics
) -> TrialReport:
    """What a run tells the study whose trial it is, if it is one."""
    return TrialReport(folder.path, world.rank, clock.cadence(cfg.eval.every, "eval.every"), metrics)


def make_watchdog(cfg: DictConfig, folder: RunFolder) -> Watchdog:
    """The watchdog, which writes stacks into the run's folder."""
    return Watchdog(folder.path / "stacks", *_timeouts(cfg))


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
    cfg: DictConfig, world: World, folder: RunFolder, callbacks: list[L.Callback], loggers: list[Logger]
) -> L.Trainer:
    """Lightning's Trainer, with all of its own checkpointing, progress and signal handling off."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # advice on settings that are ours
    # No buffers are broadcast: ours are constants, and ranks may run different numbers of evaluation batches.
    timeout = group_timeout(*_timeouts(cfg))
    ddp = DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False, timeout=timeout)
    trainer = L.Trainer(
        accelerator=world.accelerator,
        devices=world.devices,
        num_nodes=world.num_nodes,
        strategy=ddp if world.size > 1 or cfg.trainer.strategy == "ddp" else "auto",
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
