"""How processes share the work of a step: whose weights are where, and how gradients are exchanged."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

from clip_train.models import DualEncoder
from clip_train.training.callbacks.watchdog import group_timeout
from clip_train.training.durations import seconds_of
from clip_train.training.fsdp import ShardedStrategy
from clip_train.training.launch import World


def make_strategy(cfg: DictConfig, world: World, model: DualEncoder) -> DDPStrategy | str:
    """Lightning's strategy for `trainer.strategy`; `auto` where one process works alone."""
    timeout = group_timeout(*timeouts(cfg))
    if cfg.trainer.strategy == "fsdp":
        offload = bool(OmegaConf.select(cfg, "trainer.fsdp.cpu_offload"))
        return ShardedStrategy(offload, timeout=timeout)
    if cfg.trainer.strategy == "auto" and world.size == 1:
        return "auto"
    return DDPStrategy(
        bucket_cap_mb=OmegaConf.select(cfg, "trainer.ddp.bucket_cap_mb"),
        static_graph=graph_is_static(model, cfg.micro_batch_size, cfg.batch_size // world.size),
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # ours are constants, and ranks may run different numbers of evaluation batches
        timeout=timeout,
    )


def graph_is_static(model: DualEncoder, micro_batch_size: Any, local_batch: int) -> bool:
    """Whether every step has one backward pass, through the same layers, each called as often as in any other step.

    Texts in groups of similar length make the calls of their tower depend on the batch.

    Args:
        micro_batch_size: of the config: a number, None or "auto".
    """
    in_groups = getattr(model.text, "length_multiple", None) is not None and not getattr(model.text, "one_group", False)
    whole = micro_batch_size is None or (micro_batch_size != "auto" and micro_batch_size >= local_batch)
    return whole and not in_groups


def timeouts(cfg: DictConfig) -> tuple[float | None, float]:
    """Seconds without a sign of life that are too many, for any step and for the first one."""
    later, first = cfg.guard.timeout, seconds_of(cfg.guard.first_step_timeout, "guard.first_step_timeout")
    return None if later is None else seconds_of(later, "guard.timeout"), first
