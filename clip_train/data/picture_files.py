"""Pictures that are files of their own, without captions: finding them, and reading them as samples."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from clip_train.data.captions import CaptionSource
from clip_train.data.class_names import ClassNames
from clip_train.data.pairs import Pair
from clip_train.errors import ConfigError, DataError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


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


def find_pictures(pattern: str, setting: str = "images") -> list[Path]:
    """A picture, those of a folder and its subfolders, or those that a glob fits, in the order of their names.

    Args:
        setting: the config key that the pattern came from, for the error.

    Raises:
        ConfigError: there are none.
    """
    path = Path(pattern)
    if path.is_dir():
        found = list(pictures_in(path))
    elif path.exists():
        found = [path]
    else:
        anchor = Path(path.anchor)
        found = [file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file()]
    if not found:
        raise ConfigError(f"{setting}={pattern}: no such picture, nor any in a folder of that name or by that pattern")
    return sorted(found)


def pictures_in(folder: Path) -> Iterator[Path]:
    """Those of a folder and its subfolders, in no order."""
    return (file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
