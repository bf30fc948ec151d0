"""How long a step takes, by arithmetic: operations over a rate, bytes over a bandwidth, and what hides behind what."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from clip_train.planning.hardware import CPU, Hardware
from clip_train.planning.job import SIGMOID, Job
from clip_train.planning.towers import Flops
from clip_train.planning.traffic import Traffic

# Seconds that one message of a collective takes, however short.
LATENCY = 15e-6
# Of a step's products, those of backward.
_BACKWARD = 2 / 3


@dataclass(frozen=True)
class Assumptions:
    """What cannot be counted, as shares; keys of `plan`.

    Attributes:
        efficiency: of the hardware's rate, that products reach with all between them.
        link_efficiency: of a bandwidth, that collectives reach.
        overlap: of a backward pass, that an exchange of gradients can hide behind.
        network: bytes per second between nodes, per device, in place of the hardware's; None for that.
    """

    efficiency: float
    link_efficiency: float
    overlap: float
    network: float | None = None


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        towers: their products.
        loss: those of the loss.
        loss_exchange: features and their gradients on the way, which nothing hides.
        gradient_exchange: of gradients, and weights with FSDP, as far as backward does not hide it.
        host: of what is offloaded, to the device and back, which nothing hides.
        flops: operations of a rank, what is recomputed included.
    """

    towers: float
    loss: float
    loss_exchange: float
    gradient_exchange: float
    host: float
    flops: float

    @property
    def total(self) -> float:
        return self.towers + self.loss + self.loss_exchange + self.gradient_exchange + self.host


def time_step(
    job: Job,
    flops: Flops,
    learning: Collection[str],
    traffic: Traffic,
    hardware: Hardware,
    precision: str,
    assumed: Assumptions,
) -> StepTime:
    """Of one rank, which all others equal.

    Args:
        flops: of a pair with a typical text.
        learning: parts of the model that learn; the others encode a micro-batch once.
        precision: `trainer.precision`.
    """
    learned = sum(count for part, count in flops.forward.items() if part in learning)
    per_pair = flops.training + learned * (job.micro_batches - 1) / job.micro_batches
    # As large a part of backward, and of what is computed again, as of forward; nothing of what does not learn.
    in_float8 = (per_pair - flops.forward_total + learned) * flops.float8 / learned if learned else 0.0
    rate = hardware.rate(precision)
    seconds = (per_pair - in_float8) / rate + in_float8 / (hardware.float8 or rate)
    seconds *= job.local_batch / assumed.efficiency
    loss = loss_flops(job)
    loss_rate = (hardware.fp32 if job.matmul_bytes == 4 else hardware.bf16) * assumed.efficiency
    backward = _BACKWARD * seconds / job.micro_batches
    gradients = _exchange(traffic.gradients, job, hardware, assumed) - assumed.overlap * backward
    weights = _exchange(traffic.weights, job, hardware, assumed) - assumed.overlap * (seconds - backward)
    return StepTime(
        towers=seconds,
        loss=loss / loss_rate,
        loss_exchange=_exchange(traffic.loss, job, hardware, assumed) + _waiting(job),
        gradient_exchange=max(gradients, 0.0) + max(weights, 0.0),
        host=0.0 if hardware.device == CPU else traffic.host / hardware.host,
        flops=per_pair * job.local_batch + loss,
    )


def loss_flops(job: Job) -> float:
    """Of a rank: three or four products of its rows with all others, of 2 bBD operations each."""
    return (6.0 if job.loss == SIGMOID else 8.0) * job.local_batch * job.batch_size * job.embed_dim


def bandwidth(job: Job, hardware: Hardware, assumed: Assumptions) -> float:
    """Bytes per second that a rank sends, of the slowest link that a ring goes over."""
    network = hardware.network if assumed.network is None else assumed.network
    return (hardware.link if job.num_nodes == 1 else network) * assumed.link_efficiency


def _exchange(size: float, job: Job, hardware: Hardware, assumed: Assumptions) -> float:
    return size / bandwidth(job, hardware, assumed)


def _waiting(job: Job) -> float:
    """For messages, however short: ring passes one after the other, a collective as deep as a tree of the ranks."""
    if job.world_size == 1:
        return 0.0
    messages = 3 * job.world_size if job.exchange == "ring" else 6 * math.ceil(math.log2(job.world_size))
    return messages * LATENCY
