"""Decode the samples of shards and say which cannot be used, and why."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

from clip_train.data.captions import CaptionSource, UnusableCaption
from clip_train.data.decoding import decode_rgb
from clip_train.data.index import ShardIndex
from clip_train.shard_tools.access import ShardAccess
from clip_train.shard_tools.damage import Damage
from clip_train.shard_tools.indexing import index_shards
from clip_train.shard_tools.parallel import Progress, run_parallel
from clip_train.shard_tools.samples import SampleTask, Selection, StoredSample, sample_tasks


@dataclass
class Verified:
    """What was found.

    Attributes:
        num_shards, num_samples: all there are, in readable shards.
        num_checked, num_bytes: the samples that were decoded, and their files.
        damages: in the order of the shards.
    """

    num_shards: int = 0
    num_samples: int = 0
    num_checked: int = 0
    num_bytes: int = 0
    damages: list[Damage] = field(default_factory=list)


def verify_shards(
    shards: Sequence[str],
    selection: Selection,
    access: ShardAccess,
    num_workers: int,
    on_progress: Progress = lambda *_: None,
) -> Verified:
    """Decode the selected samples; if they are all, read all headers again.

    A shard that cannot be read is a damage as others are.

    Raises:
        DataError: no shard has any file under one of the keys.
    """
    found = Verified(num_shards=len(shards))
    indexes: list[ShardIndex] = []
    with closing(index_shards(shards, access, num_workers, rescan=selection.num_samples is None)) as results:
        for done, result in enumerate(results, 1):
            if isinstance(result, Damage):
                found.damages.append(result)
            else:
                indexes.append(result)
            on_progress("reading headers", done, len(shards))
    order = {shard: number for number, shard in enumerate(shards)}
    indexes.sort(key=lambda index: order[index.shard])
    found.num_samples = sum(index.num_samples for index in indexes)
    tasks = sample_tasks(indexes, selection, access)
    total = sum(len(task.rows) for task in tasks)
    with closing(run_parallel(_check, tasks, num_workers)) as results:
        for checked in results:
            found.num_checked += checked.num_checked
            found.num_bytes += checked.num_bytes
            found.damages += checked.damages
            on_progress("decoding samples", found.num_checked, total)
    found.damages.sort(key=lambda damage: (order[damage.place], damage.key))
    return found


def _check(task: SampleTask) -> Verified:
    checked, captions = Verified(), task.selection.captions
    for sample in task.read():
        checked.num_checked += 1
        checked.num_bytes += len(sample.image or b"") + sum(map(len, sample.captions.values()))
        checked.damages += _damages(sample, captions)
    return checked


def _damages(sample: StoredSample, captions: CaptionSource) -> list[Damage]:
    damages = []
    try:
        if sample.image is None:
            damages.append(Damage("image_missing", sample.shard, sample.key, "no file with one of image_key"))
        else:
            decode_rgb(sample.image)
    except OSError as error:
        damages.append(Damage(getattr(error, "kind", "image_unreadable"), sample.shard, sample.key, str(error)))
    try:
        captions.first(sample.captions)
    except UnusableCaption as error:
        damages.append(Damage(error.kind, sample.shard, sample.key, str(error)))
    return damages
