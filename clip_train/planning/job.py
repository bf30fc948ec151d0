"""What is planned for: a run's batch and the processes that share it."""

import math
from dataclasses import dataclass

CONTRASTIVE, SIGMOID, CAPTIONING = "contrastive", "sigmoid", "captioning"
DDP, FSDP = "ddp", "fsdp"


@dataclass(frozen=True)
class Job:
    """A run as its processes see it.

    Attributes:
        batch_size: global.
        devices: processes per node, one per GPU.
        micro_batch_size: None for the whole local batch.
        strategy: `ddp` or `fsdp`; one process alone exchanges nothing with `ddp`.
        loss: `contrastive`, `sigmoid` or `captioning`; any other is taken as contrastive.
        exchange: `gather` or `ring`.
        matmul_bytes: of a number in the loss's products, and of features on their way.
        embed_dim: width of the features.
        offload: `trainer.fsdp.cpu_offload`.
    """

    batch_size: int
    devices: int
    num_nodes: int
    micro_batch_size: int | None
    strategy: str
    loss: str
    exchange: str
    matmul_bytes: int
    embed_dim: int
    offload: bool = False

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def local_batch(self) -> int:
        """Pairs per step on a rank."""
        return self.batch_size // self.world_size

    @property
    def at_once(self) -> int:
        """Pairs that go through the towers at once."""
        return min(self.micro_batch_size or self.local_batch, self.local_batch)

    @property
    def micro_batches(self) -> int:
        """Per step."""
        return math.ceil(self.local_batch / self.at_once)

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients and optimizer state are in shards."""
        return self.strategy == FSDP

    @property
    def kept_share(self) -> float:
        """Of weights and optimizer state, what a device holds; host memory holds what is offloaded."""
        if not self.sharded:
            return 1.0
        return 0.0 if self.offload else 1 / self.world_size

    @property
    def gradient_share(self) -> float:
        """The same of gradients. With FSDP micro-batches add theirs up, uncut, until the last one exchanges them."""
        return 1.0 if self.sharded and self.micro_batches > 1 else self.kept_share

    @property
    def averages(self) -> bool:
        """Whether DDP exchanges gradients, and so keeps them in buckets from step to step."""
        return not self.sharded and self.world_size > 1
