"""micro_batch_size=auto: the most pairs that fit through the towers at once, found by trying, once, before step 0."""

import logging
from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from clip_train.data.batches import Batch
from clip_train.distributed import max_on_hosts
from clip_train.errors import OutOfMemoryError
from clip_train.training.memory import host_memory_limit, is_out_of_memory
from clip_train.training.module import ClipModule

log = logging.getLogger(__name__)


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
        batch = Batch(
            image=torch.zeros(self.local_batch, 3, self.image_size, self.image_size, dtype=torch.uint8),
            text=torch.full((self.local_batch, self.context_length), self.vocab_size - 1),
            bad=[],
            error="",
        )

        def try_step(pairs: int) -> None:
            with host_memory_limit(self.processes):
                pl_module.try_step(batch, pairs)

        size = find_micro_batch_size(try_step, self.local_batch, max_on_hosts)
        count = -(-self.local_batch // size)
        pl_module.micro_batch_size = size if count > 1 else None
        log.info("micro_batch_size=auto: %d, so %d micro-batch(es) per step on each device", size, count)


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
        if failed and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return not most(failed)

    too_few, enough = 0, 1
    while not fits(enough):
        if enough >= local_batch:
            raise OutOfMemoryError("out of memory with a single pair on a device: take a smaller model")
        too_few, enough = enough, min(2 * enough, local_batch)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if fits(middle):
            enough = middle
        else:
            too_few = middle
    return -(-local_batch // enough)
