"""From what a user types to a list of shard files."""

import glob
import os
from collections.abc import Sequence

from webdataset.shardlists import expand_urls

from clip_train.data.demo import DEMO_SCHEME, unpack_demo
from clip_train.errors import DataError


def expand_shards(patterns: str | Sequence[str], setting: str) -> list[str]:
    """Expand braces, globs and `PATTERN::PATTERN` to files that exist.

    Args:
        patterns: one pattern or several; `demo:NAME/...` is a built-in set.
        setting: the config key they came from, for the error.

    Raises:
        DataError: a pattern matches nothing, or a file it names is missing.
    """
    shards: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            urls = expand_urls(os.path.expanduser(pattern))
        except ValueError as error:  # braces that do not match
            raise DataError(f"{setting}={pattern}: {error}") from error
        for url in urls:
            shards.extend(_existing(url, setting))
    repeated = len(shards) - len(set(shards))
    if repeated:
        raise DataError(f"{setting} names {repeated} shard(s) more than once, first {_first_repeated(shards)}")
    return shards


def _existing(url: str, setting: str) -> list[str]:
    if url.startswith(DEMO_SCHEME):
        url = unpack_demo(url)
    elif "://" in url or url.startswith("pipe:"):
        raise DataError(f"{setting}: {url} is remote; copy the shards to a local folder and name that")
    if os.path.isdir(url):
        raise DataError(f"{setting}: {url} is a folder; name its shards, as in {os.path.join(url, '*.tar')}")
    if glob.has_magic(url):
        if found := sorted(glob.glob(url, recursive=True)):
            return found
        raise DataError(f"{setting}: no file matches {url} (working directory {os.getcwd()})")
    if not os.path.exists(url):
        raise DataError(f"{setting}: shard {url} does not exist (working directory {os.getcwd()})")
    return [url]


def _first_repeated(shards: list[str]) -> str:
    seen: set[str] = set()
    return next(shard for shard in shards if shard in seen or seen.add(shard))
