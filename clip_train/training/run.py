"""One training run, from config to summary."""

import gc
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from clip_train.checkpoints.mirror import Mirror
from clip_train.checkpoints.retention import Retention
from clip_train.checkpoints.writer import CheckpointWriter
from clip_train.data.loader import keep_workers, let_workers_end
from clip_train.data.tokenizer import VOCAB_SIZE
from clip_train.models import DualEncoder, create_dual_encoder
from clip_train.processes import die_with_parent
from clip_train.sweeps.reporting import TrialReport
from clip_train.training.agreement import RankAgreement
from clip_train.training.bad_samples import BadSamples
from clip_train.training.cached_gradients import refuse_batch_norm
from clip_train.training.checkpointing import Checkpointing, FolderCheckpointIO
from clip_train.training.config_check import check_config
from clip_train.training.data_module import ClipDataModule
from clip_train.training.durations import RUN_LENGTH_KEYS, Clock, passes, seconds_of
from clip_train.training.guard import Guard, RollBack
from clip_train.training.guard_report import write_report
from clip_train.training.health import Health
from clip_train.training.launch import World, cpus_per_process, find_world, started_by_lightning
from clip_train.training.loader_times import LoaderTimes
from clip_train.training.metrics import TrainMetrics
from clip_train.training.micro_batch import MicroBatchSearch
from clip_train.training.module import ClipModule
from clip_train.training.progress import ProgressDisplay
from clip_train.training.rank_log import start_rank_log
from clip_train.training.resume import Checkpoint, Resume, check_resumable, find_checkpoint, load_initial_weights
from clip_train.training.run_folder import RunFolder, default_run_name, environment
from clip_train.training.run_logger import RunLogger
from clip_train.training.run_start import RunStart
from clip_train.training.sample_log import SampleLog
from clip_train.training.shard_staging import ShardStaging
from clip_train.training.signals import keep_handlers
from clip_train.training.startup import announce
from clip_train.training.validation import AfterEvaluation, Validation
from clip_train.training.watchdog import Watchdog, group_timeout

log = logging.getLogger(__name__)


def train(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Train as the config says and leave a run folder behind.

    Args:
        cfg: the composed config; `run_name`, if null, is filled in.
        console: where the start-up table and the progress bar go.

    Returns:
        The summary: final metrics, samples seen, speed, and whether a signal ended the run early.

    Raises:
        ClipTrainError: the user's input is wrong, and nothing was written; or training has diverged.
    """
    outcome = _train(cfg, console)
    while isinstance(outcome, RollBack):
        gc.collect()  # the model, and what holds on to it in circles
        outcome = _train(cfg, console, undone=outcome)
    return outcome


def _train(cfg: DictConfig, console: Console, undone: RollBack | None = None) -> dict[str, Any] | RollBack:
    """The run from its checkpoint, or from that of the roll-back that led here, to its end or to the next roll-back."""
    world = find_world(cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.num_nodes)
    check_config(cfg, world)
    if started_by_lightning():
        die_with_parent()
    rank_log = start_rank_log(world.rank)
    cfg.run_name = str(cfg.run_name or default_run_name(cfg.model_name))
    folder = RunFolder(Path(str(cfg.output_dir)) / cfg.run_name)
    resume = Resume.of(cfg)
    if undone:
        resume = replace(resume, source=str(undone.checkpoint or "auto"))
    if world.rank == 0:
        folder.check_free_or_resumed(resume.source)  # again, for all ranks, when they are joined

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = _open_data(cfg, world)
    clock = Clock.of_run(cfg.batch_size, data.num_samples, **{key: cfg[key] for key in RUN_LENGTH_KEYS})
    model = create_dual_encoder(**_plain(cfg.model))
    micro_batch_size = None if cfg.micro_batch_size == "auto" else cfg.micro_batch_size
    module = ClipModule(model, _loss(cfg), _plain(cfg.optim), clock, cfg.seed, micro_batch_size)
    checkpoint = find_checkpoint(folder, resume)
    if checkpoint:
        about = {"config": _plain(cfg), "data": data.describe_data(), "world_size": world.size}
        check_resumable(checkpoint, resume, model=model, **about)
        if checkpoint.manifest.samples_seen >= clock.total_samples and folder.summary.exists():
            log.info("%s is complete", folder.path)
            return folder.read_summary()
    elif cfg.init_from:
        load_initial_weights(model, Path(cfg.init_from))

    bad_samples = BadSamples(folder.path / "bad_samples.csv", cfg.data.max_bad_fraction)
    staging = ShardStaging(data)
    guard = _guard(cfg, folder, data, last_checkpoint=lambda: checkpointing.newest(), undone=undone)
    metrics = _train_metrics(cfg, world, data, bad_samples, staging, guard)
    checkpointing = _checkpointing(cfg, world, folder, data, clock, checkpoint, metrics)
    trial = TrialReport(folder.path, world.rank, _cadence(cfg.eval.every, "eval.every", clock), metrics)
    agreement = RankAgreement(bad_samples, [staging.retries, trial.vote, *checkpointing.votes])
    told = (checkpointing.after_evaluation, trial.after_evaluation)
    validation = _validation(cfg, folder, data, clock, metrics, told)
    start = RunStart(
        folder,
        rank_log,
        config=_plain(cfg),
        config_text=OmegaConf.to_yaml(cfg, resolve=True),
        resume=resume.source,
        checkpoint=checkpoint.path if checkpoint else None,
        data_fingerprint=data.fingerprint(),
        announce=lambda: announce(console, cfg, folder, module, data, world),
    )
    search = [_micro_batch_search(cfg, model, world)] if cfg.micro_batch_size == "auto" else []
    sample_log = [SampleLog(folder.path / "samples")] if cfg.data.sample_log else []
    watchdog = Watchdog(folder.path / "stacks", *_timeouts(cfg))
    # The search comes before anything is timed.
    callbacks: list[L.Callback] = [watchdog, start, *search, guard, bad_samples, staging, agreement, metrics]
    callbacks += [*sample_log, checkpointing, ProgressDisplay(metrics, console), validation, trial]
    loggers = [instantiate(logger, save_dir=str(folder.path)) for logger in (cfg.logger or {}).values()]
    checkpointing.writer.on_saved = [partial(_tell_loggers, loggers, checkpointing.writer)]
    trainer = _trainer(cfg, world, folder, callbacks, loggers)
    with rank_log.noting_errors():
        rollback = _fit(trainer, module, data, checkpoint)
    if rollback:
        return rollback

    summary = {
        "run_name": cfg.run_name,
        "complete": module.samples_seen >= clock.total_samples,
        "stopped_by_signal": agreement.stopped_by_signal,
        "pruned": trial.pruned,
        "samples_seen": module.samples_seen,
        "steps": trainer.global_step,
        "samples_per_second": metrics.samples_per_second,
        "world_size": world.size,
        "micro_batch_size": module.micro_batch_size,
        "longest_checkpoint_stall_seconds": checkpointing.longest_stall,
        "rollbacks": guard.rollbacks,
        "metrics": {**metrics.latest, **validation.latest},
    }
    if trainer.is_global_zero:
        folder.write_summary(summary)
    return summary


def _fit(
    trainer: L.Trainer, module: ClipModule, data: ClipDataModule, checkpoint: Checkpoint | None
) -> RollBack | None:
    keep_workers()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint.path if checkpoint else None, weights_only=True)
    except RollBack as rollback:
        return rollback.with_traceback(None)  # which holds the model
    finally:
        let_workers_end()


def _train_metrics(
    cfg: DictConfig, world: World, data: ClipDataModule, bad_samples: BadSamples, staging: ShardStaging, guard: Guard
) -> TrainMetrics:
    return TrainMetrics(
        cfg.trainer.log_every,
        cfg.batch_size,
        data_metrics=lambda position: {**bad_samples.metrics(), **staging.metrics(), **data.metrics(position)},
        loader_times=LoaderTimes(data.num_workers, cpus_per_process(world), cfg.data.decode),
        guard=guard,
    )


def _guard(
    cfg: DictConfig,
    folder: RunFolder,
    data: ClipDataModule,
    last_checkpoint: Callable[[], tuple[Path, int] | None],
    undone: RollBack | None,
) -> Guard:
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
        report=partial(write_report, folder.path / "guard_report.json", batches=data.batches, config=_plain(cfg)),
        undone=undone,
    )


def _open_data(cfg: DictConfig, world: World) -> ClipDataModule:
    return ClipDataModule(
        _plain(cfg.data),
        image_size=cfg.model.image_size,
        context_length=cfg.model.text.context_length,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        world=world,
    )


def _loss(cfg: DictConfig) -> Callable[..., Tensor]:
    """The loss group's function, with the name of a dtype turned into the dtype."""
    name = OmegaConf.select(cfg, "loss.matmul_dtype")
    return instantiate(cfg.loss) if name is None else partial(instantiate(cfg.loss), matmul_dtype=getattr(torch, name))


def _micro_batch_search(cfg: DictConfig, model: DualEncoder, world: World) -> MicroBatchSearch:
    refuse_batch_norm(model)
    local_batch = cfg.batch_size // world.size
    return MicroBatchSearch(local_batch, cfg.model.image_size, cfg.model.text.context_length, VOCAB_SIZE, world.devices)


def _cadence(duration: str | int | None, setting: str, clock: Clock) -> int | None:
    return None if duration is None else clock.samples(duration, setting)


def _checkpointing(
    cfg: DictConfig,
    world: World,
    folder: RunFolder,
    data: ClipDataModule,
    clock: Clock,
    resumed_from: Checkpoint | None,
    metrics: TrainMetrics,
) -> Checkpointing:
    settings = cfg.checkpoint
    milestones = _cadence(settings.milestones, "checkpoint.milestones", clock)
    retention = Retention(
        settings.keep,
        partial(passes, batch_size=clock.batch_size, every_samples=milestones),
        best=settings.keep_best,
        metric=settings.best_metric,
        mode=settings.best_mode,
    )
    mirror = Mirror(settings.mirror) if settings.mirror else None
    return Checkpointing(
        CheckpointWriter(folder.checkpoints, retention, rank=world.rank, mirror=mirror),
        every_samples=_cadence(settings.every, "checkpoint.every", clock),
        every_minutes=settings.every_minutes,
        asynchronous=settings.asynchronous,
        resumed_from=resumed_from.path if resumed_from else None,
        about=lambda: {
            "run_name": cfg.run_name,
            "world_size": world.size,
            "config": _plain(cfg),
            "data": data.describe_data(),
            "environment": environment(),
            "wandb_run_id": folder.wandb_run_id,
        },
        metrics=metrics,
    )


def _validation(
    cfg: DictConfig,
    folder: RunFolder,
    data: ClipDataModule,
    clock: Clock,
    metrics: TrainMetrics,
    after: Sequence[AfterEvaluation],
) -> Validation:
    return Validation(
        data.val_sets,
        every_samples=_cadence(cfg.eval.every, "eval.every", clock),
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


def _precision(cfg: DictConfig, world: World) -> str:
    """What to compute in: a processor without bf16 instructions takes fp32, which is some 50 times as fast there."""
    precision = str(cfg.trainer.precision)
    if precision == "bf16-mixed" and world.accelerator == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.warning("this processor has no instructions for bf16: computing in fp32")
        return "32"
    return precision


def _tell_loggers(loggers: list[Logger], writer: CheckpointWriter, checkpoint: Path) -> None:
    for logger in loggers:
        if isinstance(logger, RunLogger):
            logger.checkpoint_saved(checkpoint, writer.is_best(checkpoint))


def _trainer(
    cfg: DictConfig, world: World, folder: RunFolder, callbacks: list[L.Callback], loggers: list[Logger]
) -> L.Trainer:
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


def _plain(cfg: Any) -> Any:
    return OmegaConf.to_container(cfg, resolve=True)
