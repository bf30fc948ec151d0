"""How many samples remote shards hold, without downloading them."""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clip_train.data.beside import read_if_there, sibling
from clip_train.data.index import cached_count
from clip_train.data.remote import scheme_of
from clip_train.data.shard_cache import copy_path
from clip_train.errors import DataError

_THREADS = 16
_log = logging.getLogger(__name__)


def remote_counts(
    urls: Sequence[str], cache_dir: str | Path, retries: int = 10, timeout: float = 60.0
) -> list[int | None]:
    """The number of samples in each shard, None where nothing tells.

    Told by, in this order: `sizes.json` in the shards' folder, as open_clip reads it; img2dataset's `00000_stats.json`
    beside `00000.tar`; the index that was cached when the shard was staged once. Without network, the last must do.

    Raises:
        DataError: one of these files cannot be read, although it seems to be there.
    """
    counts: dict[str, int | None] = dict.fromkeys(urls)
    cached = {url: cached_count(str(copy_path(url, cache_dir)), str(cache_dir)) for url in urls}
    all_cached = None not in cached.values()
    unknown: dict[str, list[str]] = {}
    for url in urls:
        if scheme_of(url) not in (None, "pipe"):
            unknown.setdefault(sibling(url, "sizes.json"), []).append(url)
    with ThreadPoolExecutor(_THREADS) as pool:

        def read(url: str) -> Any:
            try:
                return _read_json(url, min(retries, 1) if all_cached else retries, timeout)
            except DataError as error:
                if not all_cached:
                    raise
                _log.warning("%s; samples are counted in the local copies", error)

        for table, sizes in zip(unknown, pool.map(read, unknown)):
            counts |= {url: _count(sizes, _name(url), table) for url in unknown[table]}
        for folder in unknown.values():
            shards = [url for url in folder if counts[url] is None]
            # A folder has such files for all shards or for none: ask for one before asking for thousands.
            for group in (shards[:1], shards[1:]):
                files = [sibling(url, f"{_name(url).removesuffix('.tar')}_stats.json") for url in group]
                for url, file, stats in zip(group, files, pool.map(read, files)):
                    counts[url] = _count(stats, "successes", file)
                if all(counts[url] is None for url in group):
                    break
    # Last, so that a count does not depend on what happens to be in the cache.
    return [cached[url] if counts[url] is None else counts[url] for url in urls]


def _name(url: str) -> str:
    return os.path.basename(urlsplit(url).path)


def _count(table: Any, key: str, file: str) -> int | None:
    value = table.get(key) if isinstance(table, dict) else None
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise DataError(f"{file}: {key} is {value!r}, not a number of samples") from None


def _read_json(url: str, retries: int, timeout: float) -> Any:
    """The content of a small file; None if it is not there."""
    content = read_if_there(url, retries, timeout)
    try:
        return None if content is None else json.loads(content)
    except ValueError:  # web servers that answer a missing file with a page
        _log.warning("%s is not JSON and is not used", url)
        return None
