"""One training run, from config to summary."""

import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from clip_train.data.loader import keep_workers, let_workers_end
from clip_train.models import create_dual_encoder
from clip_train.processes import die_with_parent
from clip_train.training.agreement import RankAgreement
from clip_train.training.bad_samples import BadSamples
from clip_train.training.config_check import check_config
from clip_train.training.data_module import ClipDataModule
from clip_train.training.durations import RUN_LENGTH_KEYS, Clock
from clip_train.training.guard import RollBack
from clip_train.training.launch import find_world, started_by_lightning
from clip_train.training.module import ClipModule
from clip_train.training.parts import (
    make_checkpointing,
    make_guard,
    make_loggers,
    make_loss,
    make_metrics,
    make_micro_batch_search,
    make_trainer,
    make_trial_report,
    make_validation,
    make_watchdog,
    open_data,
    plain,
)
from clip_train.training.progress import ProgressDisplay
from clip_train.training.rank_log import start_rank_log
from clip_train.training.resume import Checkpoint, Resume, check_resumable, find_checkpoint, load_initial_weights
from clip_train.training.run_folder import RunFolder, default_run_name
from clip_train.training.run_start import RunStart
from clip_train.training.sample_log import SampleLog
from clip_train.training.shard_staging import ShardStaging
from clip_train.training.startup import announce

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
    cfg.run_name = str(cfg.run_name or default_run_name(cfg.model_name, world))
    folder = RunFolder(Path(str(cfg.output_dir)) / cfg.run_name)
    resume = Resume.of(cfg)
    if undone:
        resume = replace(resume, source=str(undone.checkpoint or "auto"))
    if world.rank == 0:
        folder.check_free_or_resumed(resume.source)  # again, for all ranks, when they are joined

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = open_data(cfg, world)
    clock = Clock.of_run(cfg.batch_size, data.num_samples, **{key: cfg[key] for key in RUN_LENGTH_KEYS})
    model = create_dual_encoder(**plain(cfg.model))
    micro_batch_size = None if cfg.micro_batch_size == "auto" else cfg.micro_batch_size
    module = ClipModule(model, make_loss(cfg), plain(cfg.optim), clock, cfg.seed, micro_batch_size)
    checkpoint = find_checkpoint(folder, resume)
    if checkpoint:
        about = {"config": plain(cfg), "data": data.describe_data(), "world_size": world.size}
        check_resumable(checkpoint, resume, model=model, **about)
        if checkpoint.manifest.samples_seen >= clock.total_samples and folder.is_complete(clock.total_samples):
            log.info("%s is complete", folder.path)
            return folder.read_summary()
    elif cfg.init_from:
        load_initial_weights(model, Path(cfg.init_from))

    bad_samples = BadSamples(folder.path / "bad_samples.csv", cfg.data.max_bad_fraction)
    staging = ShardStaging(data)
    guard = make_guard(cfg, folder, data, last_checkpoint=lambda: checkpointing.newest(), undone=undone)
    metrics = make_metrics(cfg, world, data, bad_samples, staging, guard)
    checkpointing = make_checkpointing(cfg, world, folder, data, clock, checkpoint, metrics)
    trial = make_trial_report(cfg, folder, world, clock, metrics)
    agreement = RankAgreement(bad_samples, [staging.retries, trial.vote, *checkpointing.votes])
    told = (checkpointing.after_evaluation, trial.after_evaluation)
    validation = make_validation(cfg, folder, data, clock, metrics, told)
    start = RunStart(
        folder,
        rank_log,
        config=plain(cfg),
        config_text=OmegaConf.to_yaml(cfg, resolve=True),
        resume=resume.source,
        checkpoint=checkpoint.path if checkpoint else None,
        data_fingerprint=data.fingerprint(),
        announce=lambda: announce(console, cfg, folder, module, data, world),
    )
    search = [make_micro_batch_search(cfg, model, world)] if cfg.micro_batch_size == "auto" else []
    sample_log = [SampleLog(folder.path / "samples")] if cfg.data.sample_log else []
    watchdog = make_watchdog(cfg, folder)
    # The search comes before anything is timed.
    callbacks: list[L.Callback] = [watchdog, start, *search, guard, bad_samples, staging, agreement, metrics]
    callbacks += [*sample_log, checkpointing, ProgressDisplay(metrics, console), validation, trial]
    loggers = make_loggers(cfg, folder, checkpointing.writer)
    trainer = make_trainer(cfg, world, folder, callbacks, loggers)
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
