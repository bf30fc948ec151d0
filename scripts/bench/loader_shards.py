"""The pictures that `loader.py` measures with: mosaics of small real photos, or the first of anyone's shards."""

import io
import json
import random
import shutil
import statistics
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from captions import SMALL_PHOTOS
from loader_contenders import BATCH
from PIL import Image
from webdataset.writer import ShardWriter

from clip_train.data.files import write_atomic
from clip_train.data.index import load_indexes
from clip_train.data.pairs import Pair, PairReader
from clip_train.data.shards import expand_shards
from clip_train.errors import DataError

NUM_PICTURES = 10 * BATCH  # whole batches, so that no loader reads samples that it does not deliver
_SAMPLES_PER_SHARD = 2 * BATCH
_QUALITIES = range(30, 100)
_JUDGED_BY = 16  # pictures that decide the quality


@dataclass(frozen=True)
class PictureSet:
    """A folder of shards of jpg and txt files, with `set.json` beside them.

    Attributes:
        about: for people.
        captions: for the tokenizers; as many as there are, not only those of the pictures.
    """

    folder: Path
    about: str
    num_samples: int
    captions: list[str]


@dataclass(frozen=True)
class _Kind:
    """Mosaics, how large they are made, and what their files shall weigh on average, as photos of that size do."""

    name: str
    size: tuple[int, int]
    mean_bytes: int


_MOSAIC = (500, 375)
_KINDS = (_Kind("photos_500x375", _MOSAIC, 109_000), _Kind("photos_1024", (1365, 1024), 253_000))


def built_sets(work: Path) -> list[PictureSet]:
    """Both sets of mosaics, made if `work` does not hold them. Raises DataError if there are no small photos."""
    missing = [kind for kind in _KINDS if not (work / kind.name / "set.json").exists()]
    if missing:
        if not SMALL_PHOTOS.parent.exists():
            raise DataError(f"no photos in {SMALL_PHOTOS.parent}: give --shards=PATTERN, shards with jpg and txt files")
        pairs = list(_pairs(str(SMALL_PHOTOS), "json:captions", work))
        photos = [Image.open(io.BytesIO(pair.image)) for pair in pairs]
        captions = [pair.captions.keys[0].read(pair.files["json"]) for pair in pairs]
        for kind in missing:
            _build(work / kind.name, kind, photos, captions)
    return [_read(work / kind.name) for kind in _KINDS]


def _build(folder: Path, kind: _Kind, photos: Sequence[Image.Image], captions: Sequence[list[str]]) -> None:
    mosaics = _mosaics(photos, kind.size)
    quality = _quality_for(list(islice(mosaics, _JUDGED_BY)), kind.mean_bytes)
    texts = (several[number % len(several)] for number, several in enumerate(captions))
    samples = [(_jpeg(mosaic, quality), text) for mosaic, text in islice(zip(mosaics, texts), NUM_PICTURES)]
    width, height = kind.size
    about = f"mosaics of {photos[0].width} px photos, {width} x {height}, JPEG quality {quality}"
    _write(folder, samples, about, list(chain(*captions)))


def first_of(pattern: str, work: Path) -> PictureSet:
    """A copy of the first JPEGs and txt captions of these shards. Raises DataError if there are too few."""
    samples = [(pair.image, pair.first_caption()) for pair in islice(_pairs(pattern, "txt", work), NUM_PICTURES)]
    samples = samples[: len(samples) // BATCH * BATCH]
    if not samples:
        raise DataError(f"--shards={pattern}: fewer than {BATCH} pictures")
    shutil.rmtree(work / "shards", ignore_errors=True)
    _write(work / "shards", samples, f"the first of {pattern}", [caption for _, caption in samples])
    return _read(work / "shards")


def _pairs(pattern: str, caption_key: str, work: Path) -> Iterator[Pair]:
    indexes = load_indexes(expand_shards(pattern, "--shards"), str(work / "index"))
    reader = PairReader(indexes, "jpg;jpeg", caption_key)
    for shard, count in enumerate(reader.counts):
        for sample in range(count):
            yield reader.read(shard, sample)


def _mosaics(photos: Sequence[Image.Image], size: tuple[int, int]) -> Iterator[Image.Image]:
    """Photos side by side, not scaled, so that there is as much to a pixel as in a photo; then all scaled to `size`."""
    chance = random.Random(0)
    side = photos[0].width
    while True:
        picture = Image.new("RGB", _MOSAIC)
        for left in range(0, _MOSAIC[0], side):
            for top in range(0, _MOSAIC[1], side):
                picture.paste(chance.choice(photos), (left, top))
        yield picture if size == _MOSAIC else picture.resize(size, Image.Resampling.BICUBIC)


def _quality_for(pictures: Sequence[Image.Image], mean_bytes: int) -> int:
    def weight(quality: int) -> float:
        return statistics.mean(len(_jpeg(picture, quality)) for picture in pictures)

    return _QUALITIES[bisect_left(_QUALITIES, mean_bytes, hi=len(_QUALITIES) - 1, key=weight)]


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _write(folder: Path, samples: Sequence[tuple[bytes, str]], about: str, captions: list[str]) -> None:
    """`set.json` comes last: a set that has one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(f"{folder}/%05d.tar", maxcount=_SAMPLES_PER_SHARD, verbose=0) as writer:
        for number, (image, caption) in enumerate(samples):
            writer.write({"__key__": f"{number:06d}", "jpg": image, "txt": caption})
    kilobytes = statistics.mean(len(image) for image, _ in samples) / 1000
    about = f"{len(samples)} pictures: {about}, {kilobytes:.0f} kB on average"
    content = {"about": about, "num_samples": len(samples), "captions": captions}
    write_atomic(folder / "set.json", json.dumps(content).encode())


def _read(folder: Path) -> PictureSet:
    return PictureSet(folder, **json.loads((folder / "set.json").read_text()))
