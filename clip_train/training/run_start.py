"""The moment a run begins: all ranks are there, none has written anything."""

import logging
from collections.abc import Callable
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from clip_train.distributed import gather_objects, raise_everywhere
from clip_train.errors import ClipTrainError
from clip_train.training.module import ClipModule
from clip_train.training.rank_log import RankLog
from clip_train.training.resume import restarted
from clip_train.training.run_folder import RunFolder
from clip_train.training.run_lock import lock_run

# Seconds for the process before to end; for one whose node died, for NFS to forget its lock.
_PATIENCE, _PATIENCE_AFTER_RESTART = 5.0, 150.0

log = logging.getLogger(__name__)


class RunStart(Callback):
    """Claims the run folder, makes sure that all ranks resume from the same place, and says what will be done.

    Args:
        folder: where the run will live.
        rank_log: this process's, which goes there.
        config: the resolved config, kept in the folder and by the loggers.
        config_text: the same, as the file to keep.
        resume: `never`, `auto` or a path.
        checkpoint: what this rank will resume from.
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
        data_fingerprint: str,
        announce: Callable[[], None],
    ) -> None:
        self.folder, self.rank_log, self.config, self.config_text = folder, rank_log, config, config_text
        self.resume, self.checkpoint, self.announce = resume, checkpoint, announce
        self.data_fingerprint = data_fingerprint

    def setup(self, trainer: L.Trainer, pl_module: ClipModule, stage: str) -> None:
        found = gather_objects([self.checkpoint.name if self.checkpoint else "none"])
        fingerprints = gather_objects([self.data_fingerprint])
        error = ""
        if trainer.is_global_zero:
            try:
                self.folder.check_free_or_resumed(self.resume)
                lock_run(self.folder.path, _PATIENCE_AFTER_RESTART if restarted() else _PATIENCE)
                self.folder.create(self.config_text)
            except ClipTrainError as refused:
                error = str(refused)
        if len(set(found)) > 1:
            error = f"the ranks find different checkpoints ({', '.join(sorted(set(found)))}): share {self.folder.path}"
        if len(set(fingerprints)) > 1:
            error = "the ranks see different shards, or different numbers of samples in them: compare the nodes' files"
        raise_everywhere(error)
        self.rank_log.open(self.folder.log_of_rank(trainer.global_rank))

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config)
        if trainer.is_global_zero:
            self.announce()
            if self.checkpoint:
                log.info("resuming from %s", self.checkpoint)
