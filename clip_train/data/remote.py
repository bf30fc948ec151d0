"""Remote files: which URLs name one, and their bytes as a stream that can begin in the middle."""

import hashlib
import io
import os
import re
import select
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from functools import lru_cache
from typing import Any, cast

import fsspec
from fsspec.asyn import sync
from fsspec.config import conf

from clip_train.data.store_addresses import google_address, hub_address
from clip_train.errors import DataError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(pipe):")
_HTTP, _GOOGLE = ("http", "https"), ("gs", "gcs")
_BLOCK, _RANGE = 1 << 20, 8 << 20
_NEEDS_EXTRA = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


@dataclass(frozen=True)
class RemoteStream:
    """The bytes of a remote file from `start` on.

    `size` is that of the whole file in bytes, None if unknown. `version` changes when the file does, and is empty where
    nothing tells. `modified` is its time in seconds since 1970.
    """

    start: int
    size: int | None
    version: str
    modified: float | None
    chunks: Iterator[bytes]


def scheme_of(url: str) -> str | None:
    """`s3` of `s3://bucket/0.tar`, `pipe` of `pipe:cat 0.tar`; None for a local path."""
    match = _SCHEME.match(url)
    scheme = match and (match[1] or match[2]).lower()
    return None if scheme == "file" else scheme


def check_scheme(url: str) -> None:
    """Raise DataError if nothing can read `url`'s scheme here. Asks no network."""
    scheme = scheme_of(url)
    if scheme is None or scheme == "pipe":
        return
    try:
        _filesystem_class(scheme)
    except ImportError as error:
        remedy = "pip install '.[remote]' in the checkout" if scheme in _NEEDS_EXTRA else str(error)
        raise DataError(f"{url}: {scheme}:// needs {_NEEDS_EXTRA.get(scheme, 'a package')}: {remedy}") from error
    except ValueError as error:
        raise DataError(f"{url}: unknown scheme {scheme}://; there are s3, gs, hf, https, http and pipe:") from error


def glob_remote(pattern: str, timeout: float) -> list[str]:
    """The files that match, sorted, as URLs; `*`, `?`, `[]` and `**` as in local globs.

    Raises:
        DataError: the scheme cannot be read, or has no listings.
    """
    check_scheme(pattern)
    scheme = scheme_of(pattern)
    if scheme is None or scheme in _HTTP:
        raise DataError(f"{pattern}: {scheme}:// has no listing; spell the shards out, as in {{00000..00099}}.tar")
    fs = _filesystem(scheme, timeout)
    fs.invalidate_cache()  # the Hub's keeps listings, whatever it is told
    return sorted(f"{scheme}://{name}" for name in fs.glob(pattern))


@contextmanager
def open_remote(url: str, timeout: float, have: int = 0, version: str = "") -> Iterator[RemoteStream]:
    """Open a remote file for reading.

    Args:
        url: of any scheme that fsspec knows, or `pipe:COMMAND`.
        timeout: seconds without a byte after which a read fails.
        have: bytes one has already, of a file whose `version` was this. The stream goes on after them if it can, or a
            byte before; if the file has changed, or only comes whole, it begins at 0.

    Raises:
        DataError: the scheme cannot be read.
        Exception: whatever the filesystem raises; see `retries.is_permanent`.
    """
    check_scheme(url)
    scheme = scheme_of(url)
    if scheme is None:
        raise ValueError(f"{url} is a local file")
    if scheme == "pipe":
        source = _open_pipe(url.partition(":")[2], timeout)
    elif scheme in (*_HTTP, *_GOOGLE, "hf"):
        source = _open_http(*_web_address(url, timeout), timeout, have, version)
    else:
        source = _open_ranges(url, timeout, have, version)
    with source as stream:
        yield stream


@contextmanager
def _open_pipe(command: str, timeout: float) -> Iterator[RemoteStream]:
    """As webdataset's gopen, but ended, with all its children, when it hangs: that one waits for two hours."""
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
    output = cast(io.FileIO, process.stdout)
    poll = select.poll()  # select() refuses descriptors over 1023
    poll.register(output, select.POLLIN)

    def read() -> Iterator[bytes]:
        while True:
            if not poll.poll(timeout * 1000):
                raise TimeoutError(f"no bytes for {timeout:g} s")
            if not (chunk := output.read(_BLOCK)):
                break
            yield chunk
        if code := process.wait(timeout):
            raise OSError(f"the command ended with exit code {code}")

    try:
        yield RemoteStream(0, None, "", None, read())
    finally:
        output.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _web_address(url: str, timeout: float) -> tuple[str, dict[str, str]]:
    """What to ask a web server for, with which headers."""
    scheme = scheme_of(url) or ""
    fs = _filesystem(scheme, timeout)
    if scheme in _HTTP:
        return url, fs.kwargs.get("headers", {})
    return hub_address(url, fs) if scheme == "hf" else google_address(url, fs)


@contextmanager
def _open_http(
    address: str, headers: dict[str, str], timeout: float, have: int, version: str
) -> Iterator[RemoteStream]:
    """One request streams the whole file: servers without ranges are common, and so are those that refuse HEAD."""
    fs = _filesystem(scheme_of(address) or "", timeout)
    start = max(have - 1, 0) if version else 0  # a byte we have: a range beyond the end would be an error
    response: Any = sync(fs.loop, _get, fs, address, headers, start)
    try:
        if start and (response.status == 416 or _http_version(response) != version or _http_start(response) > have):
            fs.loop.call_soon_threadsafe(response.close)
            response = sync(fs.loop, _get, fs, address, headers, 0)

        def read() -> Iterator[bytes]:
            while chunk := sync(fs.loop, _read_block, response.content):
                yield chunk

        modified = parsedate_tz(response.headers.get("Last-Modified"))
        time = mktime_tz(modified) if modified else None
        yield RemoteStream(_http_start(response), _http_size(response), _http_version(response), time, read())
    finally:
        fs.loop.call_soon_threadsafe(response.close)


async def _get(fs: Any, address: str, headers: dict[str, str], start: int) -> Any:
    headers = {**headers, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    session = await fs.set_session()
    response = await session.get(fs.encode_url(address), **{**fs.kwargs, "headers": headers})
    if response.status == 404:
        response.close()
        raise FileNotFoundError(address)
    if not (start and response.status == 416):
        response.raise_for_status()
    return response


async def _read_block(content: Any) -> bytes:
    """Many small chunks at once: each call changes the thread twice."""
    chunks: list[bytes] = []
    try:
        while sum(map(len, chunks)) < _BLOCK and (chunk := await content.readany()):
            chunks.append(chunk)
    except Exception:
        if not chunks:
            raise
        # What came before it is good; the next call raises it again.
    return b"".join(chunks)


def _http_start(response: Any) -> int:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if response.status == 206 and match else 0


def _http_size(response: Any) -> int | None:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return None
    if response.status == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if total.isdigit() else None
    return response.content_length


def _http_version(response: Any) -> str:
    size = _http_size(response)
    if size is None:
        return ""
    for hop in response.history:  # the Hub knows a file by its content, its delivery networks each in their own way
        if "X-Linked-ETag" in hop.headers:
            return f"{hop.headers['X-Linked-ETag']} {size}"
    return f"{response.headers.get('ETag', '')} {response.headers.get('Last-Modified', '')} {size}"


@contextmanager
def _open_ranges(url: str, timeout: float, have: int, version: str) -> Iterator[RemoteStream]:
    fs = _filesystem(scheme_of(url) or "", timeout)
    with fs.open(url, "rb", cache_type="none") as file:
        info = file.details
        if info.get("type") == "directory":
            raise IsADirectoryError(f"{url} is a folder")
        found = hashlib.sha256(repr(sorted(info.items())).encode()).hexdigest()
        start, size = (have if found == version else 0), int(info["size"])
        file.seek(start)

        def read() -> Iterator[bytes]:
            while file.tell() < size and (chunk := file.read(_RANGE)):
                yield chunk

        modified = info.get("LastModified") or info.get("mtime")
        time = modified.timestamp() if hasattr(modified, "timestamp") else None
        yield RemoteStream(start, size, found, time, read())


def _filesystem(scheme: str, timeout: float) -> Any:
    """One per process, as connections and event loops do not survive a fork; one per thread if it has no event loop."""
    shared = getattr(_filesystem_class(scheme), "async_impl", False)
    return _make_filesystem(scheme, timeout, os.getpid(), 0 if shared else threading.get_ident())


def _filesystem_class(scheme: str) -> type:
    # If not told otherwise, gcsfs asks over gRPC, which does not survive a fork, what kind of bucket each file is in.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    return fsspec.get_filesystem_class(scheme)


@lru_cache(maxsize=64)
def _make_filesystem(scheme: str, timeout: float, process: int, thread: int) -> Any:
    fs = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **_options(scheme, timeout))
    if scheme in ("s3", "s3a"):
        fs.retries = 1  # repeats are ours: three nested loops of them would take hours to give up
    return fs


def _options(scheme: str, timeout: float) -> dict[str, Any]:
    """Time-outs of connecting and of each read, on top of what the user's fsspec config says."""

    def configured(key: str) -> dict[str, Any]:
        return conf.get(scheme, {}).get(key, {})

    if scheme in ("s3", "s3a"):
        limits = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 0}}
        return {"config_kwargs": {**configured("config_kwargs"), **limits}}
    if scheme in (*_HTTP, *_GOOGLE):
        import aiohttp  # of the optional dependencies

        limits = aiohttp.ClientTimeout(total=None, connect=timeout, sock_read=timeout)
        if scheme in _HTTP:
            return {"client_kwargs": {"trust_env": True, **configured("client_kwargs"), "timeout": limits}}
        return {"requests_timeout": limits, "session_kwargs": {"trust_env": True, **configured("session_kwargs")}}
    return {}
