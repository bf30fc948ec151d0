"""Pictures that are files of their own, without captions."""

from collections.abc import Sequence
from pathlib import Path

from clip_train.data.captions import CaptionSource
from clip_train.data.class_names import ClassNames
from clip_train.data.pairs import Pair
from clip_train.errors import DataError


class PictureFiles:
    """Reads pictures as the samples of one shard, in their order.

    Args:
        folder: what the set is called.
        paths: the files, in it or in folders of it.
    """

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self._folder, self._paths = folder, paths
        self.counts = [len(paths)]

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def shard_names(self) -> list[str]:
        """The folder."""
        return [str(self._folder)]

    @property
    def classes(self) -> list[ClassNames | None]:
        """None: there are no labels."""
        return [None]

    def read(self, shard: int, sample: int) -> Pair:
        """A picture. Raises DataError if the file cannot be read."""
        try:
            return Pair(self._paths[sample].read_bytes(), {}, CaptionSource.none())
        except OSError as error:
            raise DataError(f"{self._paths[sample]} cannot be read: {error.strerror}") from error

    def name(self, shard: int, sample: int) -> str:
        """The file's path."""
        return str(self._paths[sample])

    def key(self, shard: int, sample: int) -> str:
        """The file's path in the folder, without its extension."""
        return str(self._paths[sample].relative_to(self._folder).with_suffix(""))
