"""What accompanies a run's steps, made from the config: the callbacks and how they know of each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from clip_train.checkpoints.base import Base
from clip_train.checkpoints.mirror import Mirror
from clip_train.checkpoints.retention import Retention
from clip_train.checkpoints.writer import CheckpointWriter
from clip_train.data.eval_batches import EvalBatches
from clip_train.evaluation.feature_cache import features_key
from clip_train.models.activation_checkpointing import BLOCKS, NONE, checkpointing_mode
from clip_train.models.compiling import compile_mode, convolves
from clip_train.models.layers import innermost_blocks
from clip_train.models.linear_probe import LinearProbe
from clip_train.training.cached_gradients import refuse_batch_norm
from clip_train.training.callbacks.agreement import RankAgreement
from clip_train.training.callbacks.bad_samples import BadSamples
from clip_train.training.callbacks.checkpointing import Checkpointing
from clip_train.training.callbacks.guard import Guard
from clip_train.training.callbacks.guard_report import write_report
from clip_train.training.callbacks.health import Health
from clip_train.training.callbacks.metrics import TrainMetrics
from clip_train.training.callbacks.micro_batch import MicroBatchSearch
from clip_train.training.callbacks.progress import ProgressDisplay
from clip_train.training.callbacks.sample_log import SampleLog
from clip_train.training.callbacks.shard_staging import ShardStaging
from clip_train.training.callbacks.trial_report import TrialReport
from clip_train.training.callbacks.validation import AfterEvaluation, Validation, check_best_metric
from clip_train.training.callbacks.watchdog import Watchdog
from clip_train.training.data_module import ClipDataModule
from clip_train.training.durations import Clock
from clip_train.training.instruments.limits import LimitLine, Settings
from clip_train.training.instruments.loader_times import LoaderTimes
from clip_train.training.instruments.profiling import StepProfile
from clip_train.training.instruments.utilisation import Utilisation
from clip_train.training.launch import World, cpus_per_process
from clip_train.training.module import ClipModule
from clip_train.training.optim.ema import WeightAverage
from clip_train.training.parts import plain
from clip_train.training.probe_start import ProbeStart
from clip_train.training.rank_log import RankLog
from clip_train.training.resume import Checkpoint, Resume
from clip_train.training.rollback import RollBack
from clip_train.training.run_folder import RunFolder, environment
from clip_train.training.run_start import RunStart
from clip_train.training.startup import announce
from clip_train.training.strategy import timeouts

if TYPE_CHECKING:
    from clip_train.training.instruments.compile_times import CompileTimes


@dataclass(frozen=True)
class RunPlan:
    """What is known of a run before its first step.

    Attributes:
        base: what its checkpoints go onto; None where they hold all weights.
        checkpoint: what it goes on from; None for a fresh start.
        undone: the roll-back that led here, if one did.
        looked_again: whether it is a second plan, as the ranks had found different checkpoints.
    """

    cfg: DictConfig
    world: World
    folder: RunFolder
    data: ClipDataModule
    clock: Clock
    module: ClipModule
    base: Base | None
    resume: Resume
    checkpoint: Checkpoint | None
    undone: RollBack | None
    looked_again: bool

    @property
    def retrieval_sets(self) -> dict[str, EvalBatches]:
        """What there is to evaluate by retrieval; nothing for a model that only tells classes."""
        return self.data.val_sets if "text" in self.module.model.batch_keys else {}

    @property
    def complete_already(self) -> bool:
        """Whether there is nothing left to do."""
        total = self.clock.total_samples
        at_end = self.checkpoint is not None and self.checkpoint.manifest.samples_seen >= total
        return at_end and self.folder.is_complete(total)


@dataclass(frozen=True)
class RunCallbacks:
    """The callbacks of a run that are asked for something after it, and all of them in their order."""

    guard: Guard
    metrics: TrainMetrics
    checkpointing: Checkpointing
    trial: TrialReport
    agreement: RankAgreement
    validation: Validation
    compiling: "CompileTimes | None"
    in_order: list[L.Callback]


def make_callbacks(plan: RunPlan, rank_log: RankLog, console: Console) -> RunCallbacks:
    """All callbacks of the run, told of each other."""
    cfg, folder = plan.cfg, plan.folder
    bad_samples = BadSamples(folder.path / "bad_samples.csv", cfg.data.max_bad_fraction)
    staging = ShardStaging(plan.data)
    guard = _guard(plan, last_checkpoint=lambda: checkpointing.newest())
    metrics = _metrics(plan, bad_samples, staging, guard)
    checkpointing = _checkpointing(plan, metrics)
    trial = TrialReport(folder.path, plan.world.rank, plan.clock.cadence(cfg.eval.every, "eval.every"), metrics)
    votes = [staging.retries, trial.vote, *checkpointing.votes]
    agreement = RankAgreement(bad_samples, votes, save=checkpointing.save_between_steps)
    average = None if cfg.ema.decay is None else WeightAverage(cfg.ema.decay)
    validation = _validation(plan, metrics, average, (checkpointing.after_evaluation, trial.after_evaluation))
    watchdog = Watchdog(folder.path / "stacks", *timeouts(cfg))
    start = _start(plan, rank_log, console)
    search = [_micro_batch_search(plan)] if cfg.micro_batch_size == "auto" else []
    probe = _probe_start(plan)
    compiling = _compile_times(plan)
    sample_log = [SampleLog(folder.path / "samples")] if cfg.data.sample_log else []
    progress = ProgressDisplay(metrics, console)
    # The average takes memory, so that it comes before the search; that comes before anything is timed.
    in_order = [watchdog, start, *probe, *([average] if average else []), *search, guard, bad_samples, staging]
    # Metrics before the agreement, or waiting for other ranks there would be waiting for data.
    in_order += [*([compiling] if compiling else []), metrics, agreement, *sample_log, checkpointing, progress]
    in_order += [validation, trial, *_profile(plan, metrics)]
    return RunCallbacks(guard, metrics, checkpointing, trial, agreement, validation, compiling, in_order)


def _start(plan: RunPlan, rank_log: RankLog, console: Console) -> RunStart:
    return RunStart(
        plan.folder,
        rank_log,
        config=plain(plan.cfg),
        config_text=OmegaConf.to_yaml(plan.cfg, resolve=True),
        resume=plan.resume.source,
        checkpoint=plan.checkpoint.path if plan.checkpoint else None,
        looked_again=plan.looked_again,
        data_fingerprint=plan.data.fingerprint(),
        announce=lambda: announce(console, plan.cfg, plan.folder, plan.module, plan.data, plan.world),
    )


def _guard(plan: RunPlan, last_checkpoint: Callable[[], tuple[Path, int] | None]) -> Guard:
    settings, report = plan.cfg.guard, plan.folder.path / "guard_report.json"
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
        report=partial(write_report, report, batches=plan.data.batches, config=plain(plan.cfg)),
        undone=plan.undone,
    )


def _metrics(plan: RunPlan, bad_samples: BadSamples, staging: ShardStaging, guard: Guard) -> TrainMetrics:
    cfg, data = plan.cfg, plan.data
    finetune = None if cfg.get("finetune") is None else plain(cfg.finetune)
    hardware = cfg.trainer.get("hardware")
    return TrainMetrics(
        cfg.trainer.log_every,
        cfg.batch_size,
        data_metrics=lambda position: {**bad_samples.metrics(), **staging.metrics(), **data.metrics(position)},
        loader_times=LoaderTimes(data.num_workers, cpus_per_process(plan.world), cfg.data.decode),
        guard=guard,
        utilisation=Utilisation(plain(cfg.model), finetune, hardware),
        limits=LimitLine(_speed_settings(plan)),
    )


def _speed_settings(plan: RunPlan) -> Settings:
    cfg, on_cpu = plan.cfg, plan.world.accelerator == "cpu"
    micro_batch_size = cfg.micro_batch_size  # auto is the most that fit
    convolutional = any(convolves(block) for block in innermost_blocks(plan.module.model.vision))
    return Settings(
        precision=str(cfg.trainer.precision),
        bf16=not on_cpu or torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        compiled=None if convolutional else compile_mode(cfg.trainer.get("compile", False)) is not None,
        recomputes=checkpointing_mode(cfg.model.get("grad_checkpointing", NONE)) == BLOCKS,
        encodes_twice=isinstance(micro_batch_size, int) and micro_batch_size < cfg.batch_size // plan.world.size,
        strategy=str(cfg.trainer.strategy),
        exchange=cfg.loss.get("exchange"),
    )


def _checkpointing(plan: RunPlan, metrics: TrainMetrics) -> Checkpointing:
    settings, world = plan.cfg.checkpoint, plan.world
    check_best_metric(settings.best_metric, plan.retrieval_sets, plan.data.zero_shot_sets)
    writer = CheckpointWriter(
        plan.folder.checkpoints,
        Retention(settings.keep, settings.keep_best, settings.best_metric, settings.best_mode),
        rank=world.rank,
        ranks=world.size if plan.cfg.trainer.strategy == "fsdp" else 1,  # that have something to write
        mirror=Mirror(settings.mirror, plan.folder.checkpoints) if settings.mirror else None,
    )
    return Checkpointing(
        writer,
        every_samples=plan.clock.cadence(settings.every, "checkpoint.every"),
        every_minutes=settings.every_minutes,
        milestone_samples=plan.clock.cadence(settings.milestones, "checkpoint.milestones"),
        asynchronous=settings.asynchronous,
        resumed_from=plan.checkpoint.path if plan.checkpoint else None,
        about=lambda: {
            "run_name": plan.cfg.run_name,
            "world_size": world.size,
            "config": plain(plan.cfg),
            "data": plan.data.describe_data(),
            "environment": environment(),
            "wandb_run_id": plan.folder.wandb_run_id,
            **(plan.base.about() if plan.base else {}),
        },
        metrics=metrics,
    )


def _validation(
    plan: RunPlan, metrics: TrainMetrics, average: WeightAverage | None, after: Sequence[AfterEvaluation]
) -> Validation:
    settings = plan.cfg.eval
    return Validation(
        plan.retrieval_sets,
        plan.data.zero_shot_sets,
        every_samples=plan.clock.cadence(settings.every, "eval.every"),
        batch_size=settings.batch_size,
        num_workers=plan.data.num_workers,
        pictures=plan.folder.path if settings.picture else None,
        metrics=metrics,
        average=average,
        after=after,
        owed=plan.checkpoint is not None and not plan.checkpoint.manifest.about.get("metrics"),
    )


def _probe_start(plan: RunPlan) -> list[L.Callback]:
    cfg, probe = plan.cfg, plan.module.model
    if not isinstance(probe, LinearProbe):
        return []
    precision = f"{cfg.trainer.precision} on {plan.world.accelerator}"
    key = features_key(probe, probe.features, plan.data.unaugmented(), plain(cfg.data)["image_key"], precision)
    folder = Path(cfg.data.cache_dir or plan.folder.path) / f"features_{key}"
    return [ProbeStart(plan.data, folder, cfg.eval.batch_size, fresh=plan.checkpoint is None)]


def _profile(plan: RunPlan, metrics: TrainMetrics) -> list[StepProfile]:
    steps = plan.cfg.trainer.profile
    return [StepProfile(steps, plan.folder.path / "profile", metrics.paused)] if steps else []


def _compile_times(plan: RunPlan) -> "CompileTimes | None":
    if compile_mode(plan.cfg.trainer.get("compile", False)) is None:
        return None
    from clip_train.training.instruments.compile_times import CompileTimes  # the compiler's import takes seconds

    return CompileTimes()


def _micro_batch_search(plan: RunPlan) -> MicroBatchSearch:
    refuse_batch_norm(plan.module.model)
    world, tokenizer = plan.world, plan.data.batches.tokenizer
    local_batch, vocab_size = plan.cfg.batch_size // world.size, plan.module.model.text.vocab_size
    image_size = plan.cfg.model.image_size
    return MicroBatchSearch(local_batch, image_size, tokenizer.context_length, vocab_size, world.devices)
