"""What our loggers have in common: one run in one place, gone on with when the run is resumed."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger


class RunLogger(Logger):
    """A logger of Lightning's that is told where a resumed run goes on.

    Args:
        save_dir: the run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.folder = Path(save_dir)

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any], *args, **kwargs) -> None:
        """The run folder's config.yaml has them."""

    def resume_after(self, step: int, samples_seen: int) -> None:
        """Called before the first row: the run begins, or begins again, after this step."""

    def checkpoint_saved(self, path: Path, best: bool) -> None:
        """Called for each complete checkpoint, and again when it was evaluated; not from the main thread.

        Args:
            path: its folder.
            best: whether it is the best so far.
        """
