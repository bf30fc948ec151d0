"""The `plan` group, and the job that the rest of a config describes."""

from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from clip_train.errors import ConfigError
from clip_train.planning.hardware import CPU, Hardware
from clip_train.planning.job import CAPTIONING, CONTRASTIVE, DDP, FSDP, SIGMOID, Job
from clip_train.planning.states import dtype_bytes
from clip_train.planning.timing import Assumptions
from clip_train.training.config_check import check_config
from clip_train.training.durations import Clock
from clip_train.training.launch import find_world
from clip_train.typed_config import typed

_LOSSES = {"sigmoid_loss": SIGMOID, "CaptioningLoss": CAPTIONING}
_SHARES = ("efficiency", "usable_memory", "link_efficiency", "overlap")
_POSITIVE = ("network", "price_per_hour", "caption_tokens", "images_per_core")


@dataclass
class PlanOptions:
    """configs/plan/default.yaml says what each is."""

    hardware: str
    efficiency: float
    usable_memory: float
    link_efficiency: float
    overlap: float
    network: float | None
    price_per_hour: float | None
    caption_tokens: int
    epoch_samples: Any
    images_per_core: float
    output: str | None

    @classmethod
    def of(cls, cfg: DictConfig) -> "PlanOptions":
        """Raises ConfigError for a value of the wrong type or out of range."""
        options = typed(cls, cfg.plan, "plan")
        for key in _SHARES:
            if not 0 < getattr(options, key) <= 1:
                raise ConfigError(f"plan.{key}={getattr(options, key):g} is a share: give more than 0 and at most 1")
        for key in _POSITIVE:
            value = getattr(options, key)
            if value is not None and value <= 0:
                raise ConfigError(f"plan.{key}={value:g} is not positive")
        return options

    @property
    def assumptions(self) -> Assumptions:
        network = None if self.network is None else self.network * 1e9
        return Assumptions(self.efficiency, self.link_efficiency, self.overlap, network)


def job_of(cfg: DictConfig, hardware: Hardware) -> Job:
    """The batch and its processes; `auto` is one device, and the whole local batch at once.

    Args:
        hardware: to be run on.

    Raises:
        ConfigError: as `clip-train` would, but that neither the data nor a GPU nor a compiler need be there.
    """
    if OmegaConf.is_missing(cfg.data.train, "shards"):
        cfg.data.train.shards = "unknown"
    devices = 1 if cfg.trainer.devices == "auto" else cfg.trainer.devices
    # Found as for processors, of which there are as many as one likes: the GPUs are elsewhere.
    world = find_world("cpu", devices, cfg.trainer.num_nodes)
    on_cpu = CPU in (cfg.trainer.accelerator, hardware.device)
    check_config(cfg, replace(world, accelerator="cpu" if on_cpu else "gpu"), runs_here=False)
    return Job(
        batch_size=cfg.batch_size,
        devices=world.devices,
        num_nodes=world.num_nodes,
        micro_batch_size=None if cfg.micro_batch_size == "auto" else cfg.micro_batch_size,
        strategy=FSDP if cfg.trainer.strategy == "fsdp" else DDP,
        loss=_LOSSES.get(str(cfg.loss._target_).rpartition(".")[2], CONTRASTIVE),
        exchange=str(cfg.loss.get("exchange", "gather")),
        # Rounded numbers stay in fp32 on a processor: losses/tiles.py.
        matmul_bytes=dtype_bytes(None if hardware.device == CPU else cfg.loss.get("matmul_dtype")),
        embed_dim=cfg.model.embed_dim,
        offload=bool(OmegaConf.select(cfg, "trainer.fsdp.cpu_offload")),
    )


def clock_of(cfg: DictConfig, options: PlanOptions) -> Clock:
    """How long the run is.

    Raises:
        ConfigError: no length is given, or one in epochs without the number of pairs.
    """
    if cfg.max_epochs is not None and options.epoch_samples is None:
        raise ConfigError(
            f"max_epochs={cfg.max_epochs} says no length without the number of training pairs: give"
            " plan.epoch_samples=..., or max_samples=... or max_steps=..."
        )
    pairs = 0
    if options.epoch_samples is not None:
        pairs = Clock(1, 1, 1).samples(f"{options.epoch_samples} samples", "plan.epoch_samples")
    lengths = {key: cfg[key] for key in ("max_samples", "max_steps", "max_epochs")}
    return Clock.of_run(cfg.batch_size, pairs, **lengths)
