"""Remote shards are fetched ahead of need, by one process of each node; failures of fetching are counted."""

import logging

import lightning as L
from lightning.pytorch.callbacks import Callback

from clip_train.data.batches import Batch
from clip_train.data.remote_shards import urls_ahead
from clip_train.data.stage_ahead import StageAhead
from clip_train.training.callbacks.agreement import Vote
from clip_train.training.data_module import ClipDataModule
from clip_train.training.module import ClipModule

log = logging.getLogger(__name__)


class ShardStaging(Callback):
    """Runs the node's stager beside training.

    A shard that it cannot fetch ends the run only when a loader comes to it and cannot fetch it either. It stands
    before `RankAgreement` and the metrics among the callbacks.

    Attributes:
        retries: how often downloads had to be gone on with, by the stagers and in the loaders' workers of all ranks.
    """

    def __init__(self, data: ClipDataModule) -> None:
        self.data = data
        self.retries = Vote(self._take_retries)
        self._new_retries = self._num_retries = 0
        self._ahead: StageAhead | None = None

    def metrics(self) -> dict[str, float]:
        """`data/staging_retries`, since the run was last started."""
        return {"data/staging_retries": float(self._num_retries)} if self.data.has_remote_shards else {}

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        if self.data.has_remote_shards and trainer.local_rank == 0:
            self._ahead = StageAhead(self.data.stager, self._upcoming, pl_module.position)

    def on_train_batch_start(self, trainer, pl_module, batch: Batch, batch_idx) -> None:
        self._new_retries += batch["retries"] + self.data.stager.take_retries()

    def _take_retries(self) -> int:
        taken, self._new_retries = self._new_retries, 0
        return taken

    def on_train_batch_end(self, trainer, pl_module: ClipModule, outputs, batch, batch_idx) -> None:
        self._num_retries += self.retries.total
        if self._ahead is None:
            return
        self._ahead.advance(pl_module.position)
        try:
            self._ahead.check()
        except Exception as error:
            log.warning("nothing is fetched ahead any more: %s", error)
            self._close()

    def on_train_end(self, trainer, pl_module) -> None:
        self._close()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._close()

    def _close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _upcoming(self, position: int):
        world, batches = self.data.world, self.data.batches
        first = world.rank // world.devices * world.devices  # of this node
        return urls_ahead(
            batches.order,
            batches.reader.shard_names,
            position,
            batch_size=self.data.batch_size,
            ranks=range(first, min(first + world.devices, world.size)),
            world_size=world.size,
        )
