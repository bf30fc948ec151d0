"""The table a run begins with: what will be trained, on what, for how long."""

import logging
from collections.abc import Mapping, Sequence, Sized

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from clip_train.training.data_module import ClipDataModule
from clip_train.training.launch import World
from clip_train.training.module import ClipModule
from clip_train.training.run_folder import RunFolder

log = logging.getLogger(__name__)

Weights = Sequence[tuple[str, nn.Parameter]]

_PARTS = {"vision.": "image tower", "text.": "text tower", "decoder.": "decoder"}


def announce(
    console: Console, cfg: DictConfig, folder: RunFolder, module: ClipModule, data: ClipDataModule, world: World
) -> None:
    """Print model, parameters, batch arithmetic, samples and devices, and what is odd about them."""
    console.print(_table(cfg, folder, module, data, world))
    if data.batches.reader.num_incomplete:
        log.warning("%d samples lack an image or a caption and are left out", data.batches.reader.num_incomplete)
    if module.warmup_samples > module.clock.total_samples:
        log.warning("the run ends inside its warm-up (optim.warmup=%s)", module.optim["warmup"])
    if module.clock.batch_size > data.num_samples:
        log.warning("the batch is larger than the training set: the same pair will stand in it more than once")


def _table(cfg: DictConfig, folder: RunFolder, module: ClipModule, data: ClipDataModule, world: World) -> Table:
    model, clock = module.model, module.clock
    weights = list(model.named_parameters())
    steps = clock.total_samples // clock.batch_size
    order = data.batches.order
    num_shards, epochs = len(data.batches.reader.counts), clock.total_samples / order.num_samples
    rows = {
        "run": str(folder.path),
        "model": f"{cfg.model_name} at {data.batches.image_size} px, {data.batches.tokenizer.context_length} tokens",
        "parameters": _counts(weights),
        **_learned(cfg, weights),
        "batch": f"{clock.batch_size:,} = {world.size} process(es) x {clock.batch_size // world.size:,}",
        "samples": f"{order.num_samples:,} in {num_shards:,} shards",
        "length": f"{clock.total_samples:,} samples = {steps:,} steps = {epochs:.4g} epochs",
        "optimizer": _optimizer(cfg, module),
        "validation": _sets(data.val_sets),
        **({"zero-shot": _sets(data.zero_shot_sets)} if data.zero_shot_sets else {}),
        "devices": f"{world.size} x {world.accelerator} on {world.num_nodes} node(s), {cfg.trainer.precision}",
        "loader": f"{data.num_workers} worker(s) per process",
    }
    if cfg.ema.decay is not None:
        rows["evaluated"] = f"the average of the weights, decay {cfg.ema.decay:g}"
    if module.samples_seen:
        rows["resumed"] = f"at {module.samples_seen:,} samples"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _sets(sets: Mapping[str, Sized]) -> str:
    return ", ".join(f"{name} ({len(samples):,})" for name, samples in sets.items()) or "none"


def _counts(weights: Weights, total: int | None = None) -> str:
    """Such as `1,000 = 50.00% (image tower 500, text tower 499)`, the share if a total is given."""
    counts = {part: sum(p.numel() for name, p in weights if name.startswith(prefix)) for prefix, part in _PARTS.items()}
    count = sum(p.numel() for _, p in weights)
    share = "" if total is None else f" = {count / total:.2%}"
    named = [f"{part} {count:,}" for part, count in counts.items() if count]
    return f"{count:,}{share}" + (f" ({', '.join(named)})" if named else "")


def _learned(cfg: DictConfig, weights: Weights) -> dict[str, str]:
    """What fine-tuning leaves free to learn."""
    if cfg.get("finetune") is None:
        return {}
    free, total = [(name, p) for name, p in weights if p.requires_grad], sum(p.numel() for _, p in weights)
    return {"finetune": cfg.finetune.method, "trainable": _counts(free, total)}


def _optimizer(cfg: DictConfig, module: ClipModule) -> str:
    """Such as `adamw, rate 0.0005, 64 samples of warm-up, then cosine`."""
    name, warmup = cfg.optim.get("name", "adamw"), f"{module.warmup_samples:,} samples of warm-up"
    return f"{name}, rate {module.optim['lr']:g}, {warmup}, then {cfg.schedule.name}"
