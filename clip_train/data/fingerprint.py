"""What the training data is, in a few words and hashes: kept with a checkpoint and compared when a run is resumed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from clip_train.data.mixture import Mixture
from clip_train.data.order import ORDER_VERSION, SampleOrder
from clip_train.data.pairs import PairReader
from clip_train.data.remote import scheme_of

Description = dict[str, str | int | list]

_ABSENT = "not noted"


def describe(sources: Mapping[str, PairReader], order: SampleOrder | Mixture) -> Description:
    """Everything but the seed that decides which sample stands at a position. It is plain JSON, a few lines long.

    Where the shards lie does not matter, only how they are called: nodes, or the next machine, may have them elsewhere.
    Sources without weights are one, as they are for the order.
    """
    if isinstance(order, Mixture) and len(sources) > 1:
        parts, weights = sources, order.slots.tolist()
    else:
        parts, weights = {"+".join(sources): PairReader.join(list(sources.values()))}, []
    return {
        "order_version": ORDER_VERSION,
        "lanes": order.lanes,
        "shuffle_window": order.window,
        "samples": order.num_samples,
        "weights": weights,
        "sources": [{"name": name, **describe_shards(reader)} for name, reader in parts.items()],
    }


def describe_shards(reader: PairReader) -> Description:
    """A reader's shards: how many, how they are called, and how many samples are in each; and what its labels mean."""
    names = [_name(shard) for shard in reader.shard_names]
    classes = [(found.names, found.templates) for found in reader.classes if found]
    return {
        **({"classes_sha256": _digest(classes)} if classes else {}),
        "shards": len(names),
        "samples": sum(reader.counts),
        "first": names[0],
        "last": names[-1],
        "names_sha256": _digest(names),
        "counts_sha256": _digest(reader.counts),
    }


def digest(*descriptions: Description) -> str:
    """Differs where `differences` would find any."""
    return _digest([_comparable(description) for description in descriptions])


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, in words; nothing if the stream of samples is the same for a seed.

    Args:
        old: what `describe` once returned, perhaps by way of a file.
        new: what it returns now.
    """
    found = []
    if old.get("order_version") != new["order_version"]:
        versions = f"version {new['order_version']}, was {old.get('order_version', _ABSENT)}"
        found.append(f"the order of samples: {versions}; another release of clip_train put them in another order")
    for key in ("lanes", "shuffle_window"):
        if old.get(key) != new[key]:
            found.append(f"data.{key}: {new[key]}, was {old.get(key, _ABSENT)}")
    before, now = old.get("sources", []), new["sources"]
    if len(before) != len(now):
        found.append(f"{_named(now)}, was {_named(before)}")
        return found
    if old.get("weights") != new["weights"]:
        found.append(f"data.train.weights: {_shares(new['weights'])}, was {_shares(old.get('weights', []))}")
    for source_before, source_now in zip(before, now):
        found += _shard_differences(source_before, source_now)
    return found


def _shard_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """At most one line: what is most telling about the shards of a source."""
    if all(old.get(key) == new[key] for key in ("names_sha256", "counts_sha256")):
        same_classes = old.get("classes_sha256") == new.get("classes_sha256")
        return [] if same_classes else [f"{new['name']}: its classes have other names or templates than before"]
    samples = f"{_number(new['samples'])} samples, was {_number(old.get('samples'))}"
    if old.get("names_sha256") == new["names_sha256"]:
        if old.get("samples") == new["samples"]:
            samples = f"still {_number(new['samples'])} samples, but other numbers of them in each shard"
        return [f"{new['name']}: {samples}, in shards of the same names"]
    if old.get("shards") == new["shards"]:
        what = f"{_number(new['shards'])} shards as before, but of other names or in another order"
    else:
        what = f"{_number(new['shards'])} shards, was {_number(old.get('shards'))}"
    if (old.get("first"), old.get("last")) == (new["first"], new["last"]):
        where = f"the first and last are still {new['first']} and {new['last']}"
    else:
        where = f"{new['first']} to {new['last']}, was {old.get('first')} to {old.get('last')}"
    return [f"{new['name']}: {what}; {where}; {samples}"]


def _comparable(description: Mapping[str, Any]) -> dict[str, Any]:
    """Without the names of sources, which are those of folders."""
    sources = [{k: v for k, v in source.items() if k != "name"} for source in description.get("sources", [])]
    return {**description, "sources": sources}


def _named(sources: Sequence[Mapping[str, Any]]) -> str:
    return f"{len(sources)} source{'s' * (len(sources) != 1)} ({', '.join(source['name'] for source in sources)})"


def _shares(slots: Sequence[int]) -> str:
    return "none" if not slots else " : ".join(f"{slot / sum(slots):.4g}" for slot in slots)


def _number(count: int | None) -> str:
    return _ABSENT if count is None else f"{count:,}"


def _name(shard: str) -> str:
    """The file's name; what may follow it in a web address, such as an access token, changes from run to run."""
    path = urlsplit(shard).path if scheme_of(shard) in ("http", "https") else shard
    return path.rpartition("/")[2]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
