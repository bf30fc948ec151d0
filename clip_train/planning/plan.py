"""All that `clip-plan` says: the job as it is, other ways to run it, and how it scales."""

from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from omegaconf import DictConfig

from clip_train.errors import ConfigError
from clip_train.models.activation_checkpointing import MODES, NONE, checkpointing_mode
from clip_train.models.float8 import float8_layers
from clip_train.planning.activations import Activations, measure_activations
from clip_train.planning.hardware import Hardware, find_hardware
from clip_train.planning.job import DDP, FSDP, Job
from clip_train.planning.memory import MemoryPlan, largest_micro_batch, plan_memory
from clip_train.planning.options import PlanOptions, clock_of, job_of
from clip_train.planning.states import States, beside_towers, count_states, sharded_units
from clip_train.planning.timing import StepTime, time_step
from clip_train.planning.towers import Flops, PlannedModel
from clip_train.planning.traffic import Traffic, plan_traffic
from clip_train.training.cached_gradients import refuse_batch_norm
from clip_train.training.durations import Clock
from clip_train.training.optim.optimizer import kind_of
from clip_train.training.parts import plain

_MOST_GPUS, _GPUS_PER_NODE = 1024, 8
_AUTO_WORKERS = 8  # at most: training/launch.py
_LEAST_MEASURED = 64  # pairs: with fewer, gradients may hide what grows


@dataclass(frozen=True)
class Variant:
    """A way to run the job.

    Attributes:
        checkpointing: one of `models.checkpointing.MODES`.
        fits: whether its fullest moment has room in a device.
        days, gpu_hours: of the whole run.
        cost: None without a price.
    """

    job: Job
    checkpointing: str
    memory: MemoryPlan
    fits: bool
    traffic: Traffic
    step: StepTime
    pairs_per_second: float
    days: float
    gpu_hours: float
    cost: float | None


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        flops: of a pair with a text of the whole context; `typical_flops` with `typical_tokens`, as time is reckoned.
        activations: of the towers' parts, in bytes, by kind of checkpointing; None for one that cannot be.
        chosen: the job as configured.
        largest: pairs at once that fit, as configured otherwise; None if not one does.
        alternatives, scaling: variants; of the latter, None where nothing fits.
        cores: that a GPU's share of the pictures keeps busy.
        workers: loader processes of a rank.
        notes: what the user should know.
    """

    model_name: str
    hardware: Hardware
    options: PlanOptions
    clock: Clock
    precision: str
    optimizer: str
    parameters: dict[str, int]
    learning_parameters: int
    flops: Flops
    typical_flops: Flops
    typical_tokens: int
    context_length: int
    activations: dict[str, dict[str, float] | None]
    chosen: Variant
    largest: int | None
    alternatives: list[Variant]
    scaling: dict[int, Variant | None]
    cores: float
    workers: int
    notes: list[str]


class Planner:
    """Variants of one config's job.

    Raises:
        ConfigError: what `clip-train` would refuse, or something that cannot be planned.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.options = PlanOptions.of(cfg)
        self.hardware = find_hardware(self.options.hardware)
        self.job = job_of(cfg, self.hardware)
        self.clock = clock_of(cfg, self.options)
        self.precision, self.optim = str(cfg.trainer.precision), plain(cfg.optim)
        self._config = plain(cfg.model)
        self._finetune = None if cfg.get("finetune") is None else plain(cfg.finetune)
        self.model = self.planned(NONE)
        self.states: States = count_states(self.model.model, self.optim, cfg.ema.decay is not None)
        self.units, self._beside = sharded_units(self.model.model, self.precision), beside_towers(self.model.model)
        parts = {name: part.parameters() for name, part in self.model.parts.items()}
        self.learning = [name for name, own in parts.items() if any(p.requires_grad for p in own)]
        self.may_split = _may_split(self.model)
        if self.job.micro_batch_size is not None:
            refuse_batch_norm(self.model.model)
        self._float8 = float8_layers(self.model.model) if cfg.trainer.get("float8") else []

    @cache  # noqa: B019 -- lives as long as the program
    def planned(self, checkpointing: str) -> PlannedModel:
        """The model; raises ConfigError if it cannot be checkpointed."""
        config = {**self._config, "grad_checkpointing": checkpointing}
        return PlannedModel(config, self._finetune, self.precision)

    @cache  # noqa: B019
    def activations(self, checkpointing: str) -> Activations:
        """Measured where the config is, or near."""
        return measure_activations(self.planned(checkpointing), max(self.job.at_once, _LEAST_MEASURED))

    @cache  # noqa: B019
    def flops(self, checkpointing: str, tokens: int) -> Flops:
        return self.planned(checkpointing).count_flops(tokens, self._float8)

    def tokens(self, job: Job) -> int:
        """That a typical text goes through the tower with; with FSDP as many as the longest."""
        context = self.model.context_length
        return context if job.sharded else self.model.typical_tokens(self.options.caption_tokens)

    @property
    def room(self) -> float:
        """Bytes of a device that a step may take."""
        return self.hardware.memory * self.options.usable_memory

    def memory(self, job: Job, checkpointing: str) -> MemoryPlan:
        inputs = self.model.image_size, self.model.context_length
        held = self.states, self.activations(checkpointing), self.units
        return plan_memory(job, *held, *inputs, self.hardware.device)

    def largest(self, job: Job, checkpointing: str) -> int | None:
        """Pairs at once that fit. A model with batch norm takes all of the local batch or none."""

        def peak(pairs: int) -> float:
            return self.memory(replace(job, micro_batch_size=pairs), checkpointing).peak

        if not self.may_split:
            return job.local_batch if peak(job.local_batch) <= self.room else None
        return largest_micro_batch(job, self.room, peak)

    def traffic(self, job: Job) -> Traffic:
        return plan_traffic(job, self.states.gradients, self.units, self._beside)

    def variant(self, job: Job, checkpointing: str) -> Variant:
        memory, traffic = self.memory(job, checkpointing), self.traffic(job)
        flops = self.flops(checkpointing, self.tokens(job))
        assumed = self.options.assumptions
        step = time_step(job, flops, self.learning, traffic, self.hardware, self.precision, assumed)
        seconds = step.total * self.clock.total_samples / job.batch_size
        gpu_hours = seconds / 3600 * job.world_size
        price = self.options.price_per_hour
        return Variant(
            job=job,
            checkpointing=checkpointing,
            memory=memory,
            fits=memory.peak <= self.room,
            traffic=traffic,
            step=step,
            pairs_per_second=job.batch_size / step.total,
            days=seconds / 86400,
            gpu_hours=gpu_hours,
            cost=None if price is None else price * gpu_hours,
        )

    def largest_variant(self, job: Job, checkpointing: str) -> Variant | None:
        """With the largest micro-batch that fits; None if none does."""
        pairs = self.largest(job, checkpointing)
        return None if pairs is None else self.variant(_in_parts(job, pairs), checkpointing)

    def on(self, gpus: int) -> Job | None:
        """The job on another number of devices, in nodes as now; None if the batch or the nodes do not divide."""
        per_node = self.job.devices if self.job.num_nodes > 1 else max(self.job.devices, _GPUS_PER_NODE)
        devices = min(gpus, per_node)
        if gpus % devices or self.job.batch_size % gpus:
            return None
        return replace(self.job, devices=devices, num_nodes=gpus // devices)

    def alternatives(self, ways: list[str]) -> list[Variant]:
        """Half, as many and twice the devices; each kind of checkpointing; DDP and FSDP."""
        gpus = self.job.world_size
        jobs = [self.on(count) for count in dict.fromkeys((max(gpus // 2, 1), gpus, 2 * gpus))]
        kind = kind_of(self.optim)
        may_shard = kind.can_shard and self.precision != "16-mixed" and self._finetune is None
        variants = [
            self.largest_variant(replace(job, strategy=strategy), checkpointing)
            for job in jobs
            if job is not None
            for strategy in (DDP, FSDP)
            if strategy == DDP or (may_shard and job.world_size > 1)
            for checkpointing in ways
        ]
        return [variant for variant in variants if variant is not None]

    def scaling(self, checkpointing: str) -> dict[int, Variant | None]:
        """The same batch on 1, 2, 4, ... devices, each with the largest micro-batch that fits."""
        jobs = {2**power: self.on(2**power) for power in range(_MOST_GPUS.bit_length())}
        return {gpus: self.largest_variant(job, checkpointing) for gpus, job in jobs.items() if job is not None}


def make_plan(cfg: DictConfig) -> Plan:
    """Of a config as `clip-train` takes it, with the group `plan`.

    Raises:
        ConfigError: what `clip-train` would refuse, or something that cannot be planned.
    """
    planner, checkpointing = Planner(cfg), checkpointing_mode(cfg.model.get("grad_checkpointing", NONE))
    ways = [way for way in MODES if _can(planner, way, wanted=checkpointing)]
    job, tokens = planner.job, planner.tokens(planner.job)
    largest = planner.largest(job, checkpointing)
    if cfg.micro_batch_size == "auto" and largest is not None:
        job = _in_parts(job, largest)
    chosen = planner.variant(job, checkpointing)
    rate = chosen.pairs_per_second / job.world_size
    workers = _AUTO_WORKERS if cfg.data.num_workers == "auto" else int(cfg.data.num_workers)
    saved = {way: planner.activations(way).at(job.at_once).saved if way in ways else None for way in MODES}
    return Plan(
        model_name=str(cfg.model_name),
        hardware=planner.hardware,
        options=planner.options,
        clock=planner.clock,
        precision=planner.precision,
        optimizer=str(planner.optim.get("name", "adamw")),
        parameters=planner.model.parameters(),
        learning_parameters=sum(p.numel() for p in planner.model.model.parameters() if p.requires_grad),
        flops=planner.flops(checkpointing, planner.model.context_length),
        typical_flops=planner.flops(checkpointing, tokens),
        typical_tokens=tokens,
        context_length=planner.model.context_length,
        activations=saved,
        chosen=chosen,
        largest=largest,
        alternatives=planner.alternatives(ways),
        scaling=planner.scaling(checkpointing),
        cores=rate / planner.options.images_per_core,
        workers=workers,
        notes=_notes(cfg, chosen, planner.hardware, planner.room, largest) + _loader_notes(cfg, rate, workers),
    )


def _notes(cfg: DictConfig, chosen: Variant, hardware: Hardware, room: float, largest: int | None) -> list[str]:
    notes: list[str] = []
    if not chosen.fits:
        remedy = "see the alternatives" if largest is None else f"micro_batch_size={largest} would"
        notes.append(f"does not fit: {chosen.memory.peak / 2**30:.1f} GiB of {room / 2**30:.1f}; {remedy}")
    if cfg.trainer.get("float8") and hardware.float8 is None:
        notes.append(f"trainer.float8: {hardware.name} has no rate in float8 here: its products are counted in bf16")
    if cfg.trainer.devices == "auto":
        notes.append("trainer.devices=auto is taken as 1: give the GPUs per node")
    if not str(cfg.loss._target_).startswith("clip_train.losses."):
        notes.append(f"{cfg.loss._target_} is not known here: the loss is taken as contrastive")
    if cfg.get("distill") is not None:
        notes.append("distill: the teacher's memory and time are not in these figures")
    return notes


def _loader_notes(cfg: DictConfig, rate: float, workers: int) -> list[str]:
    """If a GPU asks for more pictures per second than its loader processes deliver."""
    cores = rate / cfg.plan.images_per_core
    if cores <= max(workers, 1):
        return []
    at_most = "at most " if cfg.data.num_workers == "auto" else ""
    return [
        f"the loader will be the limit: {rate:,.0f} images/s keep {cores:.1f} cores per GPU busy, and"
        f" data.num_workers={cfg.data.num_workers} is {at_most}{workers} processes per GPU"
    ]


def _in_parts(job: Job, pairs: int) -> Job:
    return replace(job, micro_batch_size=None if pairs >= job.local_batch else pairs)


def _may_split(planned: PlannedModel) -> bool:
    try:
        refuse_batch_norm(planned.model.train())
    except ConfigError:
        return False
    return True


def _can(planner: Planner, checkpointing: str, wanted: str) -> bool:
    """Whether the model can be trained so. Raises ConfigError if the config wants what it cannot."""
    try:
        planner.activations(checkpointing)
    except Exception:  # whatever a block raises that cannot be computed again
        if checkpointing in (NONE, wanted):
            raise
        return False
    return True


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures, in bytes, seconds and operations, by the names of the fields here."""
    return asdict(plan)
