"""Bytes that a rank sends in a step, by the ring algorithms of NCCL: what is sent is what is received."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clip_train.planning.job import CAPTIONING, SIGMOID, Job
from clip_train.planning.states import ShardedUnit

_NUMBER, _COUNT = 4, 8  # bytes of a number in fp32 and of an integer
# Integers that the hosts add up before a step: agreement.py's own, and the votes in build.py (training/callbacks).
_AGREED = 3 + 4


@dataclass(frozen=True)
class Traffic:
    """Bytes per step that a rank sends.

    Attributes:
        gradients: DDP's all-reduce, or FSDP's reduce-scatter.
        weights: FSDP's all-gathers.
        features: of the loss, forward.
        feature_gradients: of the loss, backward.
        numbers: single ones: what the hosts agree on, and the norm of FSDP's gradients.
        host: not between ranks, but between a device and its host's memory, where shards are offloaded.
    """

    gradients: float
    weights: float
    features: float
    feature_gradients: float
    numbers: float
    host: float = 0.0

    @property
    def loss(self) -> float:
        """Of the loss, both ways."""
        return self.features + self.feature_gradients

    @property
    def total(self) -> float:
        """Of what goes to other ranks."""
        return self.gradients + self.weights + self.loss + self.numbers


def plan_traffic(job: Job, learning: float, units: Sequence[ShardedUnit], beside: Sequence[Tensor]) -> Traffic:
    """Of one step.

    Args:
        learning: bytes of the gradients of all that learns.
        units: that FSDP cuts.
        beside: parameters that FSDP leaves whole.
    """
    features, feature_gradients = loss_traffic(job)
    ranks = job.world_size
    numbers = all_reduced(_AGREED * _COUNT, ranks)
    if not job.sharded:
        return Traffic(all_reduced(learning, ranks), 0.0, features, feature_gradients, numbers)
    reduced = sum(unit.reduced_bytes(ranks) for unit in units) * _share(ranks)
    reduced += sum(all_reduced(p.numel() * p.element_size(), ranks) for p in beside if p.requires_grad)
    gathered = sum(unit.gathered_bytes(ranks) * _gathers(unit, job.micro_batches) for unit in units) * _share(ranks)
    numbers += all_reduced(_norm_bytes(units), ranks)
    return Traffic(reduced, gathered, features, feature_gradients, numbers, _host_bytes(job, units))


def _host_bytes(job: Job, units: Sequence[ShardedUnit]) -> float:
    """A shard goes to the device, unrounded, for each gathering, and its gradients come back once."""
    if not job.offload:
        return 0.0
    ranks = job.world_size
    return (
        sum(_gathers(unit, job.micro_batches) * unit.kept_bytes(ranks) + unit.reduced_bytes(ranks) for unit in units)
        / ranks
    )


def _norm_bytes(units: Sequence[ShardedUnit]) -> int:
    """Of the number that `training/optim/bad_step.py` adds up over the shards, in the dtype of their gradients."""
    return max((p.element_size() for unit in units for p in unit.parameters if p.requires_grad), default=0)


def _gathers(unit: ShardedUnit, micro_batches: int) -> int:
    """How often a step gathers a unit's weights.

    Of k micro-batches, all but the last go forward twice, but for a tower of which nothing learns. A block is gathered
    for each forward and each backward; a tower that learns stays gathered until it has gone backward.
    """
    forwards = micro_batches if unit.encoded_once else 2 * micro_batches - 1
    if not unit.learns:
        return forwards
    return micro_batches if unit.is_tower else forwards + micro_batches


def loss_traffic(job: Job) -> tuple[float, float]:
    """Bytes of the loss forward and backward: losses/contrastive.py, losses/sigmoid.py."""
    ranks, rows, dim = job.world_size, job.local_batch, job.embed_dim
    if ranks == 1:
        return 0.0, 0.0
    scalars = all_reduced(4 * _COUNT, ranks) + all_reduced(_NUMBER, ranks)  # shapes that agree, and the mean
    if job.loss == CAPTIONING:
        scalars += all_reduced(_COUNT, ranks) + all_reduced(_NUMBER, ranks)
    texts, gradients, sums = job.matmul_bytes * rows * dim, _NUMBER * rows * dim, _NUMBER * rows
    if job.exchange == "ring":
        forward, backward = (ranks - 1) * texts, ranks * gradients
        if job.loss == SIGMOID:
            return scalars + forward + backward, 0.0
        return scalars + forward + ranks * 2 * sums, (ranks - 1) * (texts + sums) + backward
    forward, backward = (ranks - 1) * texts, (ranks - 1) * gradients
    if job.loss == SIGMOID:
        return scalars + forward + backward, 0.0
    return scalars + forward + 2 * all_reduced(ranks * sums, ranks), backward


def all_reduced(size: float, ranks: int) -> float:
    """Bytes that each rank sends in an all-reduce: a reduce-scatter and an all-gather."""
    return 2 * _share(ranks) * size


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks
