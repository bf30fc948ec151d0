"""One training run, from config to summary."""

import logging
import warnings
from pathlib import Path
from typing import Any, cast

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from clip_train.errors import ConfigError
from clip_train.models import create_dual_encoder
from clip_train.training.agreement import RankAgreement
from clip_train.training.checkpoints import AtomicCheckpointIO, Checkpointing
from clip_train.training.data_module import ClipDataModule
from clip_train.training.durations import RUN_LENGTH_KEYS, Clock
from clip_train.training.launch import World, find_world
from clip_train.training.metrics import TrainMetrics
from clip_train.training.module import ClipModule
from clip_train.training.progress import ProgressDisplay
from clip_train.training.run_folder import RunFolder, default_run_name
from clip_train.training.startup import print_startup_table
from clip_train.training.validation import Validation

log = logging.getLogger(__name__)

PRECISIONS = ("32", "bf16-mixed", "16-mixed", "bf16-true")


def train(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Train as the config says and leave a run folder behind.

    Args:
        cfg: the composed config; `run_name`, if null, is filled in.
        console: where the start-up table and the progress bar go.

    Returns:
        The summary: final metrics, samples seen, speed, and whether a signal ended the run early.

    Raises:
        ClipTrainError: the user's input is wrong; nothing was written.
    """
    world = find_world(cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.num_nodes)
    _check_config(cfg, world)
    if world.rank > 0:
        logging.getLogger("clip_train").setLevel(logging.WARNING)
    cfg.run_name = str(cfg.run_name or default_run_name(cfg.model_name))
    folder = RunFolder(Path(str(cfg.output_dir)) / cfg.run_name)
    checkpoint = folder.checkpoint_to_resume(str(cfg.resume))
    if world.rank == 0:
        folder.check_free_or_resumed(str(cfg.resume))

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = ClipDataModule(
        _plain(cfg.data),
        image_size=cfg.model.image_size,
        context_length=cfg.model.text.context_length,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        world=world,
    )
    clock = Clock.of_run(cfg.batch_size, data.num_samples, **{key: cfg[key] for key in RUN_LENGTH_KEYS})
    model = create_dual_encoder(**_plain(cfg.model))
    module = ClipModule(model, instantiate(cfg.loss), _plain(cfg.optim), clock)
    metrics = TrainMetrics(cfg.trainer.log_every, cfg.batch_size)
    agreement = RankAgreement(metrics, cfg.data.max_bad_fraction)
    checkpoint_every = None if cfg.checkpoint.every is None else clock.samples(cfg.checkpoint.every, "checkpoint.every")
    checkpointing = Checkpointing(folder.checkpoints, checkpoint_every, cfg.checkpoint.keep)
    validation = _validation(cfg, folder, data, clock)
    callbacks = [agreement, metrics, checkpointing, ProgressDisplay(metrics, console), validation]
    if world.rank == 0:
        folder.create(OmegaConf.to_yaml(cfg, resolve=True))
    trainer = _trainer(cfg, world, folder, callbacks)
    for logger in trainer.loggers:
        logger.log_hyperparams(_plain(cfg))
    if world.rank == 0:
        _announce(cfg, folder, module, data, world, console, checkpoint)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)

    summary = {
        "run_name": cfg.run_name,
        "complete": module.samples_seen >= clock.total_samples,
        "stopped_by_signal": agreement.stopped_by_signal,
        "samples_seen": module.samples_seen,
        "steps": trainer.global_step,
        "samples_per_second": metrics.samples_per_second,
        "world_size": world.size,
        "metrics": {**metrics.latest, **validation.latest},
    }
    if trainer.is_global_zero:
        folder.write_summary(summary)
    return summary


def _check_config(cfg: DictConfig, world: World) -> None:
    if not isinstance(cfg.batch_size, int) or cfg.batch_size < 1:
        raise ConfigError(f"batch_size={cfg.batch_size} is not a positive number of samples")
    if rest := cfg.batch_size % world.size:
        below, above = cfg.batch_size - rest, cfg.batch_size - rest + world.size
        nearest = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"batch_size={cfg.batch_size} does not divide over {world.size} processes; the nearest that do: {nearest}"
        )
    if str(cfg.trainer.precision) not in PRECISIONS:
        raise ConfigError(f"trainer.precision={cfg.trainer.precision} is none of {', '.join(PRECISIONS)}")
    if cfg.trainer.strategy not in ("auto", "ddp"):
        raise ConfigError(f"trainer.strategy={cfg.trainer.strategy} is neither auto nor ddp")
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: give {missing[0]}=...")


def _validation(cfg: DictConfig, folder: RunFolder, data: ClipDataModule, clock: Clock) -> Validation:
    return Validation(
        data.val_sets,
        every_samples=None if cfg.eval.every is None else clock.samples(cfg.eval.every, "eval.every"),
        batch_size=cfg.eval.batch_size,
        num_workers=data.num_workers,
        picture=folder.path / "retrieval.png" if cfg.eval.picture else None,
    )


def _trainer(cfg: DictConfig, world: World, folder: RunFolder, callbacks: list[L.Callback]) -> L.Trainer:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # advice on settings that are ours
    # No buffers are broadcast: ours are constants, and ranks may run different numbers of evaluation batches.
    ddp = DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
    return L.Trainer(
        accelerator=world.accelerator,
        devices=world.devices,
        num_nodes=world.num_nodes,
        strategy=ddp if world.size > 1 or cfg.trainer.strategy == "ddp" else "auto",
        precision=cast(Any, str(cfg.trainer.precision)),
        plugins=[world.environment, AtomicCheckpointIO()],
        callbacks=callbacks,
        logger=[instantiate(logger, save_dir=str(folder.path)) for logger in (cfg.logger or {}).values()],
        max_epochs=-1,  # the module ends the run when `samples_seen` reaches its length
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder.path),
    )


def _announce(cfg, folder, module, data, world, console, checkpoint) -> None:
    print_startup_table(
        console,
        run=str(folder.path),
        model_name=cfg.model_name,
        module=module,
        data=data,
        world=world,
        precision=str(cfg.trainer.precision),
    )
    if data.batches.reader.num_incomplete:
        log.warning("%d samples lack an image or a caption and are left out", data.batches.reader.num_incomplete)
    if module.clock.batch_size > data.num_samples:
        log.warning("the batch is larger than the training set: the same pair will stand in it more than once")
    if checkpoint:
        log.info("resuming from %s", checkpoint)


def _plain(cfg: Any) -> Any:
    return OmegaConf.to_container(cfg, resolve=True)
