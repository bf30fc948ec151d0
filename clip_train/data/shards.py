"""From what a user types to a list of shards: local files that exist, and URLs."""

import glob
import os
from collections.abc import Sequence

from webdataset.shardlists import expand_urls

from clip_train.data.demo import DEMO_SCHEME, unpack_demo
from clip_train.data.remote import check_scheme, glob_remote, scheme_of
from clip_train.data.retries import with_retries
from clip_train.errors import DataError

_LISTING_TIMEOUT_S, _LISTING_RETRIES = 60.0, 5


def expand_shards(patterns: str | Sequence[str], setting: str) -> list[str]:
    """Expand braces, globs and `PATTERN::PATTERN` to local files that exist, and to URLs.

    The network is asked for globs only (`s3://bucket/*.tar`), not for URLs that are spelt out.

    Args:
        patterns: one pattern or several; `demo:NAME/...` is a built-in set.
        setting: the config key they came from, for the error.

    Raises:
        DataError: a pattern matches nothing, a local file it names is missing, or nothing can read its scheme.
    """
    shards: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            urls = expand_urls(os.path.expanduser(pattern))
        except (ValueError, AssertionError) as error:  # braces that do not match; ${NAME} without WDS_NAME
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
    elif scheme_of(url):
        return _remote(url, setting)
    url = url.removeprefix("file://")
    if os.path.isdir(url):
        raise DataError(f"{setting}: {url} is a folder; name its shards, as in {os.path.join(url, '*.tar')}")
    if glob.has_magic(url):
        if found := sorted(glob.glob(url, recursive=True)):
            return found
        raise DataError(f"{setting}: no file matches {url} (working directory {os.getcwd()})")
    if not os.path.exists(url):
        raise DataError(f"{setting}: shard {url} does not exist (working directory {os.getcwd()})")
    return [url]


def _remote(url: str, setting: str) -> list[str]:
    magic = "*[" if scheme_of(url) in ("http", "https") else "*?["  # in a web address, ? begins the query
    try:
        if scheme_of(url) == "pipe" or not any(character in url for character in magic):
            check_scheme(url)
            return [url]
        found = with_retries(lambda: glob_remote(url, _LISTING_TIMEOUT_S), f"listing {url}", _LISTING_RETRIES)
    except DataError as error:
        raise DataError(f"{setting}: {error}") from error
    if not found:
        raise DataError(f"{setting}: no file matches {url}")
    return found


def _first_repeated(shards: list[str]) -> str:
    seen: set[str] = set()
    return next(shard for shard in shards if shard in seen or seen.add(shard))
