"""The moment a run begins: all ranks are there, none has written anything."""

import logging
from collections.abc import Callable
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from clip_train.distributed import gather_strings, raise_everywhere
from clip_train.errors import ClipTrainError
from clip_train.training.module import ClipModule
from clip_train.training.run_folder import RunFolder

log = logging.getLogger(__name__)


class RunStart(Callback):
    """Claims the run folder, makes sure that all ranks resume from the same place, and says what will be done.

    Args:
        folder: where the run will live.
        config: the resolved config, kept in the folder and by the loggers.
        config_text: the same, as the file to keep.
        resume: `never`, `auto` or a path.
        checkpoint: what this rank will resume from.
        announce: prints the start-up table; called on the first rank.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        config: dict,
        config_text: str,
        resume: str,
        checkpoint: Path | None,
        announce: Callable[[], None],
    ) -> None:
        self.folder, self.config, self.config_text = folder, config, config_text
        self.resume, self.checkpoint, self.announce = resume, checkpoint, announce

    def setup(self, trainer: L.Trainer, pl_module: ClipModule, stage: str) -> None:
        found = gather_strings([self.checkpoint.name if self.checkpoint else "none"])
        error = ""
        if trainer.is_global_zero:
            try:
                self.folder.check_free_or_resumed(self.resume)
                self.folder.create(self.config_text)
            except ClipTrainError as refused:
                error = str(refused)
        if len(set(found)) > 1:
            error = f"the ranks find different checkpoints ({', '.join(sorted(set(found)))}): share {self.folder.path}"
        raise_everywhere(error)

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config)
        if trainer.is_global_zero:
            self.announce()
            if self.checkpoint:
                log.info("resuming from %s", self.checkpoint)
