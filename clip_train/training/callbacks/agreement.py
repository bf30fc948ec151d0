"""What all ranks must decide together, once per step: stopping by a signal, giving up on bad data, saving."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from clip_train.data.batches import Batch
from clip_train.distributed import gather_objects, group_size, host_group
from clip_train.errors import DataError, FaultError
from clip_train.training.callbacks.bad_samples import BadSamples
from clip_train.training.instruments.step_times import COMMUNICATION
from clip_train.training.module import ClipModule
from clip_train.training.signals import stop_requested


@dataclass
class Vote:
    """A number that each rank gives before a step, so that all act on the sum after it.

    Attributes:
        ask: this rank's number.
        total: the sum over ranks, as of the start of the current step.
    """

    ask: Callable[[], int]
    total: int = 0


class RankAgreement(Callback):
    """Ends the run at the end of a step that all ranks finish, whichever rank got the signal or the bad sample.

    One reduction of a few integers per step, through the host, so that it does not wait for the accelerator; bad
    samples, which are rare, are gathered.

    Args:
        bad_samples: told of every rank's.
        votes: what others want the sum of.
        save: called on all ranks before the run ends because there is no data for a step.

    Attributes:
        stopped_by_signal: the run was cut short and can be resumed.
    """

    def __init__(
        self, bad_samples: BadSamples, votes: Sequence[Vote], save: Callable[[L.Trainer, ClipModule], None]
    ) -> None:
        self.bad_samples, self.votes, self.save = bad_samples, votes, save
        self.stopped_by_signal = False
        self._group: Any = None

    def setup(self, trainer, pl_module, stage) -> None:
        if group_size() > 1:
            self._group = host_group()

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        if self._sum([stop_requested() is not None])[0]:  # it came before there was a step to finish
            self._stop(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: ClipModule, batch: Batch, batch_idx: int) -> None:
        signalled = stop_requested() is not None
        local = [bool(batch["error"]), signalled, len(batch["bad"]), *(vote.ask() for vote in self.votes)]
        with pl_module.times.part(COMMUNICATION):
            failed, signalled, bad, *totals = self._sum(local)
        for vote, total in zip(self.votes, totals, strict=True):
            vote.total = total
        if failed:
            errors = [(batch["error"], batch.get("passing", False))] if batch["error"] else []
            reason, passing = gather_objects(errors, self._group)[0]
            self.save(trainer, pl_module)
            # A run that has come so far had its data right: started again, it may go on.
            raise FaultError(reason) if passing and pl_module.samples_seen else DataError(reason)
        if bad:
            found = gather_objects(batch["bad"], self._group)
            samples_seen = pl_module.samples_seen + pl_module.clock.batch_size
            self.bad_samples.add(found, samples_seen, write=trainer.is_global_zero)
        if signalled:
            self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        self.stopped_by_signal = True
        trainer.should_stop = True  # after this step

    def _sum(self, local: Sequence[int]) -> list[int]:
        total = torch.tensor(local, dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return total.tolist()
