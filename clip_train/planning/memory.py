"""What a rank's device holds at the fullest moment of a step, and the largest micro-batch that it has room for."""

from collections.abc import Callable
from dataclasses import dataclass

from clip_train.planning.activations import Activations, Footprint
from clip_train.planning.job import SIGMOID, Job
from clip_train.planning.states import ShardedUnit, States

_TILE = {"cpu": 2 * 4 * 384 * 768, "cuda": 2 * 4 * 4096 * 8192}  # two of fp32: losses/tiles.py


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on a rank.

    Attributes:
        batch: pixels and token ids of a step and of the next one; with micro-batches also the features of all pairs of
            a step and their gradients.
        activations: what each part of the model keeps for backward.
        passing: what backward needs besides, for a moment; with FSDP, what is gathered of the weights.
        loss: at its fullest moment, which is not backward's.
        peak: the most at any moment.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    batch: float
    activations: dict[str, float]
    passing: float
    loss: float
    peak: float


def plan_memory(
    job: Job,
    states: States,
    activations: Activations,
    units: list[ShardedUnit],
    image_size: int,
    context: int,
    device: str,
) -> MemoryPlan:
    """Of a step after the first one, when the optimizer has its state.

    Args:
        states: of the whole model.
        activations: with the checkpointing that there is.
        units: that FSDP cuts.
        image_size, context: of the inputs.
        device: `cpu` or `cuda`.
    """
    share = job.kept_share
    footprint = activations.at(job.at_once)
    gathered = _gathered(units) if job.sharded else 0.0
    batch = 2 * job.local_batch * (3 * image_size**2 + 8 * context)  # training/copied_ahead.py sends the next one
    if job.micro_batches > 1:
        batch += 16 * job.local_batch * job.embed_dim
    loss = loss_bytes(job, device)
    kept = share * (states.weights + states.optimizer + states.average) + batch
    gradients = job.gradient_share * states.gradients
    peak = kept + gathered + _fullest_moment(job, footprint, gradients, loss)
    return MemoryPlan(
        weights=share * states.weights,
        gradients=gradients,
        optimizer=share * states.optimizer,
        average=share * states.average,
        batch=float(batch),
        activations=footprint.saved,
        passing=footprint.peak - footprint.saved_total + gathered,
        loss=loss,
        peak=peak,
    )


def _fullest_moment(job: Job, footprint: Footprint, gradients: float, loss: float) -> float:
    """In the loss, in backward or in the optimizer's step, of what comes and goes."""
    if job.averages or job.sharded or job.micro_batches > 1:  # gradients are there from the first backward on
        return gradients + max(footprint.peak, footprint.saved_total + loss)
    return max(footprint.peak_with_gradients, footprint.saved_total + loss, gradients)


def _gathered(units: list[ShardedUnit]) -> float:
    """The towers' own weights, two blocks with the buffers that they come in, and a block's gradients twice.

    Gradients are in the dtype of the gathered weights, and in that of the kept ones where they are averaged.
    """
    towers = sum(unit.gathered_bytes(1) for unit in units if unit.is_tower)
    blocks = (5 * unit.gathered_bytes(1) + unit.reduced_bytes(1) for unit in units if not unit.is_tower)
    return towers + max(blocks, default=0.0)


def loss_bytes(job: Job, device: str) -> float:
    """Of the loss at its fullest, above the features: docs/large_batch.md, "Memory of the loss"."""
    rows, every, dim = job.local_batch, job.batch_size, job.embed_dim
    tiles = min(_TILE[device], 2 * 4 * rows * every)
    if job.loss == SIGMOID:
        return tiles + _sigmoid_bytes(job)
    if job.world_size == 1:
        return tiles + max(16 * every, 8 * every * dim)
    if job.exchange == "ring":
        return tiles + 24 * rows * dim
    forward = job.matmul_bytes * every * dim + 8 * every
    backward = (job.matmul_bytes + 1) * every * dim + 8 * rows * dim
    return tiles + max(forward, backward)


def _sigmoid_bytes(job: Job) -> float:
    """Gradients made forward and copies handed out; with several ranks also texts that travel, and their gradients."""
    rows, every, dim = job.local_batch, job.batch_size, job.embed_dim
    if job.world_size == 1:
        return 16 * every * dim
    if job.exchange == "ring":
        return 32 * rows * dim
    return (job.matmul_bytes + 4) * every * dim + 12 * rows * dim


def largest_micro_batch(job: Job, room: float, peak_of: Callable[[int], float]) -> int | None:
    """The most pairs at once that fit: those of the fewest micro-batches of equal size. None if no pair does.

    Args:
        room: bytes of a device that may be taken.
        peak_of: bytes with so many pairs at once.
    """
    if peak_of(1) > room:
        return None
    fits, too_many = 1, job.local_batch + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if peak_of(middle) <= room:
            fits = middle
        else:
            too_many = middle
    count = -(-job.local_batch // fits)
    return -(-job.local_batch // count)
