"""Labelled pictures as files: a folder for each class, as torchvision's ImageFolder has them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from clip_train.data.captions import CaptionSource
from clip_train.data.class_names import (
    CLASSES_JSON,
    DEFAULT_TEMPLATE,
    LABEL_EXTENSION,
    NAMES_TXT,
    ClassNames,
    read_class_names,
)
from clip_train.data.pairs import Pair
from clip_train.errors import DataError


def find_class_folders(folder: Path, extensions: Sequence[str], setting: str = "data") -> dict[str, list[Path]]:
    """The pictures of each folder that has any, by its name; all in the order of their names.

    Args:
        folder: of the class folders.
        extensions: of pictures, in any case.
        setting: where the folder is in the config, for errors.

    Raises:
        DataError: there are none.
    """
    suffixes = {f".{extension.lower()}" for extension in extensions}
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if files := sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file()):
            found[path.name] = files
    if not found:
        raise DataError(
            f"{setting}: {folder} has neither shards (*.tar) nor folders of pictures ({';'.join(extensions)})"
        )
    return found


def folder_classes(folder: Path, found: Mapping[str, Sequence[Path]]) -> ClassNames:
    """What `classes.json` or `classnames.txt` says, in the folder or, as for shards, in the one above.

    Else it is the class folders' names, `_` as a blank.
    """
    if any((place / name).is_file() for place in (folder, folder.parent) for name in (CLASSES_JSON, NAMES_TXT)):
        return read_class_names(None, str(folder / "_"), "task.classes")
    return ClassNames(tuple(_readable(name) for name in found), (DEFAULT_TEMPLATE,))


class ClassFolders:
    """Reads the pictures of class folders as one shard, in the order of their names.

    A folder is the class of its name; where no folder has the name of a class, that of its place among them.

    Args:
        folder: of the class folders.
        found: from `find_class_folders`.
        classes: what the labels stand for.

    Raises:
        DataError: the folders are neither named as the classes nor as many.
    """

    def __init__(self, folder: Path, found: Mapping[str, Sequence[Path]], classes: ClassNames) -> None:
        labels = _labels(folder, list(found), classes)
        self._folder, self._captions = folder, CaptionSource.parse(LABEL_EXTENSION, classes)
        self._samples = [(file, labels[name]) for name, files in found.items() for file in files]
        self.counts = [len(self._samples)]

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def shard_names(self) -> list[str]:
        """The folder."""
        return [str(self._folder)]

    @property
    def classes(self) -> list[ClassNames | None]:
        """What the labels stand for."""
        return [self._captions.classes]

    def read(self, shard: int, sample: int) -> Pair:
        """A picture and its label. Raises DataError if the file cannot be read."""
        file, label = self._samples[sample]
        try:
            return Pair(file.read_bytes(), {LABEL_EXTENSION: str(label).encode()}, self._captions)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error

    def name(self, shard: int, sample: int) -> str:
        """The file's path."""
        return str(self._samples[sample][0])

    def key(self, shard: int, sample: int) -> str:
        """The file's path in the folder, without its extension."""
        return str(self._samples[sample][0].relative_to(self._folder).with_suffix(""))


def _labels(folder: Path, names: Sequence[str], classes: ClassNames) -> dict[str, int]:
    numbers = {name: label for label, name in enumerate(classes.names)}
    by_name = {name: numbers.get(name, numbers.get(_readable(name))) for name in names}
    labels = {name: label for name, label in by_name.items() if label is not None}
    if len(labels) == len(names) and len(numbers) == len(classes):  # ImageNet has two names twice
        return labels
    if len(names) == len(classes) and (not labels or len(numbers) < len(classes)):
        return {name: label for label, name in enumerate(names)}
    unknown = next((name for name in names if name not in labels), names[0])
    raise DataError(
        f"{folder} has {len(names)} class folders and there are {len(classes)} classes: {unknown!r} names none of them"
    )


def _readable(name: str) -> str:
    return " ".join(name.replace("_", " ").split())
