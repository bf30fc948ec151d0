"""The moment a run begins: all ranks are there, none has written anything."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from clip_train.checkpoints.folder import list_checkpoints
from clip_train.distributed import gather_objects, raise_everywhere
from clip_train.errors import ClipTrainError, DataError, FaultError
from clip_train.training.module import ClipModule
from clip_train.training.rank_log import RankLog
from clip_train.training.resume import restarted
from clip_train.training.run_folder import RunFolder
from clip_train.training.run_lock import lock_run

# Seconds for the process before to end; for one whose node died, for NFS to forget its lock.
_PATIENCE, _PATIENCE_AFTER_RESTART = 5.0, 150.0
# Seconds for a node to see what another has written: NFS keeps listings of folders for up to a minute.
_LISTING_SECONDS = 90.0

log = logging.getLogger(__name__)


class LookAgain(Exception):
    """The ranks have found different checkpoints, but see the same by now: they leave, to plan the run anew."""


class RunStart(Callback):
    """Claims the run folder, makes sure that all ranks resume from the same place, and says what will be done.

    Args:
        folder: where the run will live.
        rank_log: this process's, which goes there.
        config: the resolved config, kept in the folder and by the loggers.
        config_text: the same, as the file to keep.
        resume: `never`, `auto` or a path.
        checkpoint: what this rank will resume from.
        looked_again: whether it is what was found after `LookAgain`.
        data_fingerprint: of the training data that this rank sees.
        announce: prints the start-up table; called on the first rank.
    """

    def __init__(
        self,
        folder: RunFolder,
        rank_log: RankLog,
        *,
        config: dict,
        config_text: str,
        resume: str,
        checkpoint: Path | None,
        looked_again: bool,
        data_fingerprint: str,
        announce: Callable[[], None],
    ) -> None:
        self.folder, self.rank_log, self.config, self.config_text = folder, rank_log, config, config_text
        self.resume, self.checkpoint, self.announce = resume, checkpoint, announce
        self.looked_again, self.data_fingerprint = looked_again, data_fingerprint

    def setup(self, trainer: L.Trainer, pl_module: ClipModule, stage: str) -> None:
        self._agree_on_checkpoint()
        fingerprints = gather_objects([self.data_fingerprint])
        error = ""
        if trainer.is_global_zero:
            try:
                self.folder.check_free_or_resumed(self.resume)
                lock_run(self.folder.path, _PATIENCE_AFTER_RESTART if restarted() else _PATIENCE)
                self.folder.create(self.config_text)
            except ClipTrainError as refused:
                error = str(refused)
        if len(set(fingerprints)) > 1:
            error = "the ranks see different shards, or different numbers of samples in them: compare the nodes' files"
        raise_everywhere(error)
        self.rank_log.open(self.folder.log_of_rank(trainer.global_rank))

    def _agree_on_checkpoint(self) -> None:
        """Make sure that all ranks have found the same; a run that was started again at once may look again.

        Raises:
            LookAgain: on all ranks.
            FaultError: a rank of a run that was started again does not see what another does.
            DataError: likewise, of any other run.
        """
        found = gather_objects([self.checkpoint])
        if len({path.name if path else None for path in found}) == 1:
            return
        folder = self.folder.checkpoints.resolve()
        own = [path.name for path in found if path and path.resolve().parent == folder]
        if restarted() and own and not self.looked_again and self._all_see(max(own)):
            log.info("some ranks have found an older checkpoint than %s: looking again", max(own))
            raise LookAgain
        names = sorted({path.name if path else "none" for path in found})
        error = f"the ranks find different checkpoints ({', '.join(names)}): share {self.folder.path}"
        raise FaultError(error) if restarted() else DataError(error)

    def _all_see(self, name: str) -> bool:
        """Whether a checkpoint comes to be seen by all ranks, before one of them has lost its patience."""
        end = time.monotonic() + _LISTING_SECONDS
        while True:
            seen = any(path.name == name for path in list_checkpoints(self.folder.checkpoints))
            of_ranks = gather_objects([(seen, time.monotonic() < end)])
            if all(seen for seen, _ in of_ranks):
                return True
            if not all(patient for _, patient in of_ranks):
                return False
            time.sleep(1)

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config)
        if trainer.is_global_zero:
            self.announce()
            if self.checkpoint:
                log.info("resuming from %s", self.checkpoint)
