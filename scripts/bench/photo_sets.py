"""Sets that benchmarks make of other sets: shards of samples, as clip-benchmark lays them out."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from clip_train.data.files import whole_file


def samples(folder: Path) -> Iterator[dict[str, Any]]:
    """The samples of a folder of shards, in their order: files by their extension, undecoded, and `__key__`."""
    return iter(WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False))  # pyright: ignore


def first_of_each(labelled: Iterable[tuple[dict, int]], most: int) -> list[tuple[dict, int]]:
    """The first samples of each class, in the order they come."""
    seen: Counter[int] = Counter()
    chosen = []
    for sample, label in labelled:
        seen[label] += 1
        if seen[label] <= most:
            chosen.append((sample, label))
    return chosen


def write_shard(path: Path, content: Iterable[dict[str, Any]]) -> None:
    """One shard of samples, if it is not there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file, TarWriter(file) as tar:
        for sample in content:
            tar.write({name: value for name, value in sample.items() if name == "__key__" or name[0] != "_"})


def write_benchmark_set(folder: Path, parts: dict[str, Sequence[dict[str, Any]]]) -> None:
    """What clip-benchmark reads as `wds/NAME`: a folder for each part with shards and their number."""
    for part, content in parts.items():
        write_shard(folder / part / "0.tar", content)
        (folder / part / "nshards.txt").write_text("1")


def write_classes(folder: Path, classes: Path) -> None:
    """The names and templates of a `classes.json`, as clip-benchmark reads them."""
    content = json.loads(classes.read_text())
    templates = [template.replace("{}", "{c}") for template in content["templates"]]
    (folder / "classnames.txt").write_text("\n".join(content["classnames"]))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
