"""micro_batch_size=auto: the most pairs that fit through the towers at once, found by trying, once, before step 0."""

import gc
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clip_train.distributed import max_on_hosts
from clip_train.errors import OutOfMemoryError
from clip_train.models.cpu_attention import fast_attention
from clip_train.out_of_memory import is_out_of_memory
from clip_train.planning.states import optimizer_bytes
from clip_train.training.cached_gradients import cached_backward
from clip_train.training.memory import host_memory_limit
from clip_train.training.module import ClipModule

log = logging.getLogger(__name__)

# Bytes left free: for the next batch, the loss's tiles, and because no two steps fragment memory alike.
_MARGIN = 1 << 29


class MicroBatchSearch(Callback):
    """Sets the module's `micro_batch_size`, the same on every rank.

    Args:
        local_batch: pairs per step on a rank.
        image_size: side of the images.
        context_length, vocab_size: of the texts.
        processes: that share this machine's memory.
    """

    def __init__(self, local_batch: int, image_size: int, context_length: int, vocab_size: int, processes: int) -> None:
        self.local_batch, self.image_size, self.processes = local_batch, image_size, processes
        self.context_length, self.vocab_size = context_length, vocab_size

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        images = torch.zeros(self.local_batch, 3, self.image_size, self.image_size, dtype=torch.uint8)
        texts = torch.full((self.local_batch, self.context_length), self.vocab_size - 2)
        texts[:, -1] = self.vocab_size - 1  # the end: as long as texts can be

        def try_step(pairs: int) -> None:
            # A GPU says itself that it is full.
            with host_memory_limit(self.processes) if pl_module.device.type == "cpu" else nullcontext():
                _hold_what_a_step_holds(pl_module, images.to(pl_module.device), texts.to(pl_module.device), pairs)

        size = find_micro_batch_size(try_step, self.local_batch, max_on_hosts)
        count = -(-self.local_batch // size)
        pl_module.micro_batch_size = size if count > 1 else None
        log.info("micro_batch_size=auto: %d, so %d micro-batch(es) per step on each device", size, count)


def _hold_what_a_step_holds(module: ClipModule, images: Tensor, texts: Tensor, pairs: int) -> None:
    """Two micro-batches forward and backward, beside what the optimizer and the loss will hold; leaves nothing behind.

    Raises:
        RuntimeError: memory ran out.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = cast(LightningOptimizer, module.optimizers())
    held = [] if optimizer.state else _as_large_as_the_state(module, parameters)
    # The loss: both features, their gradients and those of the gathered texts, with these.
    rows = 4 * len(images) + 2 * module.clock.batch_size
    held.append(torch.ones(rows, module.model.embed_dim, device=module.device))
    held.append(torch.ones(_MARGIN // 4, device=module.device))
    try:
        # Blocks that are compiled (trainer.compile) take about as much memory, but each size tried would be compiled.
        eager = torch.compiler.set_stance("force_eager")
        with eager, fast_attention(module.device), module.trainer.precision_plugin.train_step_context():
            cached_backward(
                module.model,
                lambda *features: torch.stack([x.sum() for x in features if x.requires_grad]).sum(),
                {},
                (images[: 2 * pairs], texts[: 2 * pairs]),
                micro_batch_size=pairs,
                backward=lambda scalar, last: scalar.backward(),
            )
    finally:
        for parameter in parameters:
            parameter.grad = None


def _as_large_as_the_state(module: ClipModule, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Memory of the size that the optimizer's state will have, where it will be; of sharded parameters a shard's."""
    per_byte = optimizer_bytes(module.model, module.optim) / sum(parameter.nbytes for parameter in parameters)
    own = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return [torch.ones(int(per_byte * p.nbytes), dtype=torch.uint8, device=p.device) for p in own]


def find_micro_batch_size(try_step: Callable[[int], None], local_batch: int, most: Callable[[int], int]) -> int:
    """The largest micro-batch that fits: that of the fewest micro-batches of equal size.

    Args:
        try_step: runs the towers forward and backward on so many pairs; raises when memory runs out.
        local_batch: pairs per step on this rank.
        most: of a number, the greatest over the ranks; all ranks call it equally often.

    Raises:
        OutOfMemoryError: not even one pair fits.
    """

    def fits(count: int) -> bool:
        failed = 0
        try:
            try_step(-(-local_batch // count))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = 1
        if failed:
            gc.collect()  # the graph of the failed pass
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return not most(failed)

    # From few pairs to many: a host's allocator does not give back all that a failed attempt took.
    enough = too_few = local_batch
    while fits(too_few):
        if too_few == 1:
            return local_batch
        enough, too_few = too_few, -(-too_few // 2)
    if enough == too_few:
        raise OutOfMemoryError("out of memory with a single pair on a device: take a smaller model")
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if fits(middle):
            enough = middle
        else:
            too_few = middle
    return -(-local_batch // enough)
