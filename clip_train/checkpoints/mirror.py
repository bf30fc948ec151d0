"""A second copy of the checkpoints at an fsspec address, such as s3://bucket/runs/b32."""

from pathlib import Path

import fsspec

from clip_train.checkpoints.folder import MANIFEST
from clip_train.errors import ConfigError


class Mirror:
    """Copies checkpoints to a folder elsewhere.

    Args:
        url: the folder; s3:// and gs:// need the extra `clip_train[remote]`.

    Raises:
        ConfigError: there is no such kind of address, or its library is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.mirror={url}: {error}") from error

    def upload(self, checkpoint: Path) -> None:
        """Copy a checkpoint; its manifest comes last, so that a copy that has one is whole.

        Raises:
            Exception: whatever the store has to say.
        """
        target = f"{self.root}/{checkpoint.name}"
        self.files.makedirs(target, exist_ok=True)
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == MANIFEST):
            self.files.put_file(str(path), f"{target}/{path.name}")

    def remove(self, name: str) -> None:
        """Remove a copy, if there is one, its manifest first."""
        target = f"{self.root}/{name}"
        if self.files.exists(target):
            if self.files.exists(f"{target}/{MANIFEST}"):
                self.files.rm_file(f"{target}/{MANIFEST}")
            self.files.rm(target, recursive=True)
