"""Embed a set: every process its share of the parts, each sample exactly once."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from clip_train.checkpoints.base import weights_checksum
from clip_train.data.files import UNFINISHED
from clip_train.data.loader import make_loader
from clip_train.distributed import agreed, gather_objects, group_rank, group_size
from clip_train.embedding.batches import PartBatch, PartBatches, Row
from clip_train.embedding.manifest import Manifest
from clip_train.embedding.options import IMAGE, TEXT, EmbedOptions
from clip_train.embedding.part_files import check_pyarrow, read_about, write_part
from clip_train.embedding.sources import Source, Task, find_sources
from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.loaded_model import LoadedModel
from clip_train.evaluation.results import writing_into
from clip_train.interop.model_source import ModelSource
from clip_train.interop.reading import lasting
from clip_train.shard_tools.access import ShardAccess
from clip_train.shard_tools.damage import Damage, write_damages

SKIPPED = "skipped.csv"
_POLL_S = 0.05
_LONGEST_WAIT = timedelta(days=7)  # of the rank that is done first for the last


class Tally(NamedTuple):
    """What one process did, or all.

    Attributes:
        samples: that have embeddings now.
        new: of those, embedded just now.
        seconds: that it took to embed these.
    """

    samples: int
    new: int
    parts: int
    seconds: float
    bad: list[Damage]


class Progress(NamedTuple):
    """Of this process, after a batch."""

    parts: int
    of_parts: int
    samples: int
    seconds: float


@dataclass
class _Part:
    """What has come in of a part so far. Embeddings stay on the device until all are there."""

    embeddings: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    bad: list[Damage] = field(default_factory=list)

    def add(self, batch: PartBatch, loaded: LoadedModel, sides: Sequence[str]) -> None:
        """Embed a batch."""
        model, device = loaded.model, loaded.device
        ways: dict[str, Callable[[], Tensor]] = {
            IMAGE: lambda: model.encode_image(batch.image.to(device, non_blocking=True)),
            TEXT: lambda: model.encode_text(batch.text),
        }
        for side in sides:
            encoded = ways[side]() if batch.rows else torch.empty(0, model.embed_dim, device=device)
            self.embeddings.setdefault(side, []).append(encoded)
        self.rows += batch.rows
        self.bad += batch.bad

    def joined(self, options: EmbedOptions) -> dict[str, np.ndarray]:
        """The embeddings of all of the part's samples."""
        dtype = np.dtype(options.dtype)
        return {side: torch.cat(parts).float().cpu().numpy().astype(dtype) for side, parts in self.embeddings.items()}


def embed(
    model: LoadedModel,
    weights: Mapping[str, Any],
    options: EmbedOptions,
    access: ShardAccess,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Tally:
    """Write the embeddings that are missing in `options.output`; all ranks call this.

    Args:
        model: on this rank's device.
        weights: of `describe_weights`, for the manifest.
        access: how shards are reached.
        show: told after each batch.

    Returns:
        Of all ranks together.

    Raises:
        ClipTrainError: on every rank, after all have done what they could.
    """
    folder = Path(options.output).expanduser()
    with agreed():
        check_pyarrow()
        sources = find_sources(options, access)
        manifest = Manifest(weights, _settings(options), [source.name for source in sources])
    if len(set(gather_objects([manifest.digest()]))) > 1:
        raise DataError(f"data={options.data} or weights={weights['weights']} is not the same on all processes")
    with agreed(), writing_into(folder):  # nothing is written before all know what the folder is to hold
        if group_rank() == 0:
            _claim(folder, manifest)
    with agreed(), writing_into(folder):
        parts = _look_at(folder, sources, manifest, options.sides)
    # Nor before all have looked which parts are there.
    with agreed(options.batch_size), _waited_for_all(), writing_into(folder):
        tally = _embed_parts(model, options, folder, parts, show)
    total = _total(gather_objects([tally]))
    with agreed(), writing_into(folder):
        if group_rank() == 0:
            write_damages(folder / SKIPPED, total.bad)
    if not total.samples:
        raise DataError(f"none of the samples of data={options.data} can be used; the first: {total.bad[0].detail}")
    return total


@contextmanager
def _waited_for_all() -> Iterator[None]:
    """The ranks part inside for as long as the work takes; all else that they do together is a matter of minutes."""
    group: Any = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT) if group_size() > 1 else None
    try:
        yield
    except Exception:  # which all hear of
        _meet(group)
        raise
    _meet(group)


def _meet(group: Any) -> None:
    """Wait for all ranks, if there are others, and hear signals meanwhile, as a collective would not."""
    if group is None:
        return
    work = dist.barrier(group, async_op=True)
    assert work
    while not work.is_completed():
        time.sleep(_POLL_S)
    work.wait()  # raises what went wrong


def describe_weights(source: ModelSource, given: Mapping[str, Any]) -> dict[str, Any]:
    """Which weights they are, and where they were: for a model that is not on a device yet.

    Args:
        given: what they were opened with; `weights` and `base` are places.
    """
    places = {key: lasting(given[key]) for key in ("weights", "base") if given.get(key)}
    config = {key: value for key, value in source.config.items() if key != "grad_checkpointing"}
    config["text"] = {key: value for key, value in config["text"].items() if key != "length_multiple"}
    return {**given, **places, "model": config, "sha256": weights_checksum(source.model.state_dict())}


def _claim(folder: Path, manifest: Manifest) -> None:
    """Say what the folder holds, or find that it holds the same, and remove what a killed program had half written.

    Raises:
        ConfigError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output={folder} is no folder: give another output=")
    if old := Manifest.read(folder):
        manifest.check_goes_on(old, folder)
    elif any(path.suffix != UNFINISHED and not path.name.startswith(".") for path in folder.glob("*")):
        raise ConfigError(f"output={folder} holds something else than embeddings of clip-embed: give another output=")
    for unfinished in (*folder.glob(f"*{UNFINISHED}"), *folder.glob(f"*/*{UNFINISHED}")):
        unfinished.unlink(missing_ok=True)
    manifest.write(folder)


def _settings(options: EmbedOptions) -> dict[str, Any]:
    """What decides the embeddings, beside model and data; the size of batches changes their last digits at most."""
    names = ("image_key", "caption_key", "metadata", "dtype", "precision")
    return {"modality": list(options.sides), **{name: getattr(options, name) for name in names}}


class _Place(NamedTuple):
    """A part, what it is stamped with, and what is there of it: as `read_about` says."""

    number: int
    source: Source
    stamp: str
    found: tuple[int, list[Damage]] | None


def _look_at(folder: Path, sources: Sequence[Source], manifest: Manifest, sides: Sequence[str]) -> list[_Place]:
    places = []
    for number, source in enumerate(sources):
        stamp = f"{manifest.made_by()} {source.stamp()}"
        places.append(_Place(number, source, stamp, read_about(folder, number, sides, stamp)))
    return places


def _embed_parts(
    model: LoadedModel,
    options: EmbedOptions,
    folder: Path,
    parts: Sequence[_Place],
    show: Callable[[Progress], None],
) -> Tally:
    """Write this rank's share of the parts that are missing; the first rank counts those that are there."""
    own = [place for place in parts if not place.found][group_rank() :: group_size()]
    stamps = {place.number: place.stamp for place in own}
    done = [place.found for place in parts if place.found] if group_rank() == 0 else []
    samples, bad = sum(count for count, _ in done), [damage for _, damages in done for damage in damages]
    begin, new, finished = time.monotonic(), 0, 0
    part = _Part()
    with torch.no_grad(), model.autocast():
        for (number, last), batch in _loaded(model, options, [(place.number, place.source) for place in own]):
            part.add(batch, model, options.sides)
            new += len(batch.rows)
            if last:
                values = part.joined(options)
                if not all(np.isfinite(side).all() for side in values.values()):
                    raise DataError(
                        f"the embeddings of part {number} are not numbers (NaN): the weights are damaged, or training"
                        " has diverged"
                    )
                write_part(folder, number, stamps[number], values, part.rows, options.metadata, part.bad)
                bad += part.bad
                part, finished = _Part(), finished + 1
            show(Progress(finished, len(own), new, time.monotonic() - begin))
    return Tally(samples + new, new, len(done) + len(own), time.monotonic() - begin, bad)


def _loaded(
    model: LoadedModel, options: EmbedOptions, parts: Sequence[tuple[int, Source]]
) -> Iterator[tuple[tuple[int, bool], PartBatch]]:
    """The batches of the parts in their order, each with its part's number and whether it is the part's last."""
    places: deque[tuple[int, bool]] = deque()

    def tasks() -> Iterator[Task]:
        for number, source in parts:
            found = source.tasks()
            for task in found:
                places.append((number, task is found[-1]))
                yield task

    source = model.source
    batches = PartBatches(options, model.tokenizer, source.image_size, source.resize_mode, source.interpolation)
    pin_memory = model.device.type == "cuda"
    for batch in make_loader(cast(Any, batches), tasks(), model.num_workers, pin_memory) if parts else ():
        if batch.error:
            raise DataError(batch.error)
        yield places.popleft(), batch


def _total(tallies: Sequence[Tally]) -> Tally:
    samples, new, parts = (sum(numbers) for numbers in list(zip(*tallies))[:3])
    slowest = max(tally.seconds for tally in tallies)
    return Tally(samples, new, parts, slowest, sorted(damage for tally in tallies for damage in tally.bad))
