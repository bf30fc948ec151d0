"""One training run, from config to summary."""

import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig
from rich.console import Console

from clip_train.checkpoints.mirror import Mirror
from clip_train.data.loader import keep_workers, let_workers_end
from clip_train.processes import die_with_parent
from clip_train.training.callbacks.build import RunCallbacks, RunPlan, make_callbacks
from clip_train.training.callbacks.checkpointing import finish_copies
from clip_train.training.config_check import check_config
from clip_train.training.durations import RUN_LENGTH_KEYS, Clock
from clip_train.training.finetuning import load_base, prepare
from clip_train.training.launch import World, find_world, started_by_lightning
from clip_train.training.parts import (
    check_tokenizer,
    make_loggers,
    make_model,
    make_module,
    make_trainer,
    open_data,
    plain,
)
from clip_train.training.rank_log import start_rank_log
from clip_train.training.resume import Resume, check_resumable, find_checkpoint
from clip_train.training.rollback import RollBack, note_rollback, noted_rollback
from clip_train.training.run_folder import RunFolder, default_run_name
from clip_train.training.run_start import LookAgain

log = logging.getLogger(__name__)


def train(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Train as the config says and leave a run folder behind.

    Args:
        cfg: the composed config; `run_name`, if null, is filled in.
        console: where the start-up table and the progress bar go.

    Returns:
        The summary: final metrics, samples seen, speed, and whether a signal ended the run early. And `trained`: false
        if the run was complete before.

    Raises:
        ClipTrainError: the user's input is wrong, and nothing was written; or training has diverged.
    """
    undone, looked_again = None, False
    while not isinstance(outcome := _train(cfg, console, undone, looked_again), dict):
        if isinstance(outcome, RollBack):
            undone = outcome
        else:
            looked_again = True
        gc.collect()  # the model, and what holds on to it in circles
    return outcome


def _train(
    cfg: DictConfig, console: Console, undone: RollBack | None, looked_again: bool
) -> dict[str, Any] | RollBack | LookAgain:
    """The run from its checkpoint, or from that of the roll-back that led here, to its end or to where it is left."""
    world = find_world(cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.num_nodes)
    check_config(cfg, world)
    if started_by_lightning():
        die_with_parent()
    rank_log = start_rank_log(world.rank)
    plan = _plan(cfg, world, undone, looked_again)
    if plan.complete_already:
        log.info("%s is complete", plan.folder.path)
        _complete_mirror(plan)
        return {**plan.folder.read_summary(), "trained": False}

    callbacks = make_callbacks(plan, rank_log, console)
    loggers = make_loggers(cfg, plan.folder, callbacks.checkpointing.writer)
    trainer = make_trainer(cfg, world, plan.folder, plan.module.model, callbacks.in_order, loggers)
    with rank_log.noting_errors():
        left = _fit(trainer, plan)
    if left:
        if isinstance(left, RollBack) and trainer.is_global_zero:
            note_rollback(plan.folder.rollback, left)
        return left
    summary = _summary(trainer, plan, callbacks)
    if trainer.is_global_zero:
        plan.folder.write_summary(summary)
    return {**summary, "trained": True}


def _plan(cfg: DictConfig, world: World, undone: RollBack | None, looked_again: bool) -> RunPlan:
    """Name the run, open its data, make its model and find where it begins; nothing is written."""
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
    model = make_model(cfg)
    check_tokenizer(data.batches.tokenizer, model.text)
    checkpoint = find_checkpoint(folder, resume)
    base = load_base(model, cfg, checkpoint)
    module = make_module(cfg, clock, prepare(model, cfg, data), adapter_only=base is not None)
    data.serve(module.model.batch_keys)
    if checkpoint:
        about = {"config": plain(cfg), "data": data.describe_data(), "world_size": world.size}
        check_resumable(checkpoint, resume, module=module, **about)
    if resume.source != "never":
        undone = undone or noted_rollback(folder.rollback, checkpoint.path if checkpoint else None)
    return RunPlan(cfg, world, folder, data, clock, module, base, resume, checkpoint, undone, looked_again)


def _complete_mirror(plan: RunPlan) -> None:
    """Copy the last checkpoint of a complete run, where the run itself could not."""
    if plan.cfg.checkpoint.mirror and plan.checkpoint and plan.world.rank == 0:
        mirror = Mirror(plan.cfg.checkpoint.mirror, plan.folder.checkpoints)
        mirror.upload_missing(plan.checkpoint.path)
        finish_copies(mirror)
        mirror.wait(0)


def _fit(trainer: L.Trainer, plan: RunPlan) -> RollBack | LookAgain | None:
    keep_workers()
    checkpoint = plan.checkpoint.path if plan.checkpoint else None
    try:
        trainer.fit(plan.module, datamodule=plan.data, ckpt_path=checkpoint, weights_only=True)
    except (RollBack, LookAgain) as left:
        return left.with_traceback(None)  # which holds the model
    finally:
        let_workers_end()


def _summary(trainer: L.Trainer, plan: RunPlan, callbacks: RunCallbacks) -> dict[str, Any]:
    module, metrics = plan.module, callbacks.metrics
    return {
        "run_name": plan.cfg.run_name,
        "complete": module.samples_seen >= plan.clock.total_samples,
        "stopped_by_signal": callbacks.agreement.stopped_by_signal,
        "pruned": callbacks.trial.pruned,
        "samples_seen": module.samples_seen,
        "steps": trainer.global_step,
        "samples_per_second": metrics.samples_per_second,
        "world_size": plan.world.size,
        "parameters": sum(p.numel() for p in module.parameters()),
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "micro_batch_size": module.micro_batch_size,
        "compile_seconds": callbacks.compiling.seconds if callbacks.compiling else None,
        "longest_checkpoint_stall_seconds": callbacks.checkpointing.longest_stall,
        "rollbacks": callbacks.guard.rollbacks,
        "metrics": {**metrics.latest, **callbacks.validation.latest},
    }
