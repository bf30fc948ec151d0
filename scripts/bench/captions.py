"""The texts that steps are measured with: their lengths decide how long a step takes."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

from clip_train.data.demo import unpack_demo
from clip_train.data.index import load_indexes
from clip_train.data.pairs import PairReader
from clip_train.data.shards import expand_shards

SMALL_PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "flickr8k_train" / "*.tar"
_WORDS = (10, 15, 8, 12, 17, 9, 11, 6, 13, 11)  # of captions of those photos, a tenth of them each


@dataclass(frozen=True)
class Captions:
    """Some texts.

    Attributes:
        source: where they come from.
    """

    texts: Sequence[str]
    source: str

    def words(self, count: int | None = None) -> float:
        """Per text, on average; of the first so many."""
        return statistics.mean(len(text.split()) for text in self.texts[:count])


def find_captions(count: int, shards: str | None = None) -> Captions:
    """At most so many: of `shards`, or of small photos if they are at hand; else they are made up.

    Raises:
        DataError: these shards cannot be read, or have no txt files.
    """
    if shards is None and not SMALL_PHOTOS.parent.exists():
        names = _of_shards(unpack_demo("demo:emoji/train") + "/*.tar", 1 << 20)
        made_up = list(islice(_made_up(names), count))
        return Captions(made_up, "names of the demo's pictures in rows as long as captions of photos")
    return Captions(_of_shards(shards or str(SMALL_PHOTOS), count), shards or SMALL_PHOTOS.parent.name)


def _of_shards(pattern: str, count: int) -> list[str]:
    with TemporaryDirectory() as folder:
        reader = PairReader(load_indexes(expand_shards(pattern, "--shards"), folder), "jpg;jpeg;png;webp", "txt")
        places = ((shard, sample) for shard, held in enumerate(reader.counts) for sample in range(held))
        return [reader.read(*place).first_caption() for place in islice(places, count)]


def _made_up(names: Sequence[str]) -> Iterator[str]:
    words = cycle(" ".join(names).split())
    for length in cycle(_WORDS):
        yield " ".join(islice(words, length))
