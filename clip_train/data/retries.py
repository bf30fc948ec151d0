"""Failures of networks and disks: which of them pass, what to tell of them, and trying again."""

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from clip_train.errors import DataError, UnreachableError

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0
_TEMPORARY_STATUS = (408, 416, 425, 429)
_PERMANENT_ERRORS = (DataError, FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError)
_PERMANENT_BOTO_ERRORS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError")

_log = logging.getLogger(__name__)
_jitter = random.SystemRandom()  # not the seeded generators of the run, which forked workers share besides
_T = TypeVar("_T")


class Cancelled(Exception):
    """Given up because the caller said so."""


def never() -> bool:
    """For `cancelled`."""
    return False


def with_retries(
    attempt: Callable[[], _T],
    name: str,
    retries: int,
    cancelled: Callable[[], bool] = never,
    count: Callable[[], None] = lambda: None,
) -> _T:
    """Run `attempt` until it succeeds; each time it is run again, log a warning and call `count`.

    Raises:
        DataError: the failure is permanent; the message begins with `name`.
        UnreachableError: it came `retries + 1` times; likewise.
        Cancelled: `cancelled()` became true, or `attempt` raised it.
    """
    for number in itertools.count(1):
        try:
            return attempt()
        except (Cancelled, DataError):
            raise
        except Exception as error:
            reason = explain(error)
            if is_permanent(error):
                raise DataError(f"{name}: {reason}") from error
            if number > retries:
                raise UnreachableError(f"{name}: given up after {number} attempts: {reason}") from error
            count()
            _log.warning("%s: %s; retry %d of %d", name, reason, number, retries)
            wait(_back_off(number), cancelled)
    raise AssertionError("unreachable")


def _back_off(number: int) -> float:
    """Seconds before another attempt: doubled each time up to a limit, and spread so that ranks do not come at once."""
    return min(_FIRST_WAIT_S * 2 ** (number - 1), _LONGEST_WAIT_S) * _jitter.uniform(0.5, 1)


def wait(seconds: float, cancelled: Callable[[], bool]) -> None:
    """Sleep, but not on after `cancelled()`; then raise Cancelled."""
    end = time.monotonic() + seconds
    while not cancelled():
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, 0.1))
    raise Cancelled


def is_permanent(error: BaseException) -> bool:
    """Whether to ask again would be in vain: no such file, no access, no credentials, a malformed URL."""
    status = _http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _TEMPORARY_STATUS
    if isinstance(error, _PERMANENT_ERRORS):
        return True
    return type(error).__name__ in _PERMANENT_BOTO_ERRORS or str(error).startswith("Forbidden")  # the latter: gcsfs


def explain(error: BaseException) -> str:
    """The reason of a failure, in one line."""
    status = _http_status(error)
    text = f"{status} {_server_message(error)}" if hasattr(error, "status") else " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if type(error).__name__ == "NoCredentialsError":
        return "no credentials found; for a public bucket set the environment variable FSSPEC_S3_ANON=true"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"access is denied ({text})"
    if isinstance(error, asyncio.TimeoutError) and not text:
        return "no bytes within the time-out"
    return text or type(error).__name__


def _server_message(error: Any) -> str:
    """Why, in the Hub's words if it has any, or the usual ones of the status."""
    return (getattr(error, "headers", None) or {}).get("X-Error-Message") or error.message


def _http_status(error: BaseException) -> int | None:
    """The status code in the errors of aiohttp, gcsfs and huggingface_hub."""
    for source in (error, getattr(error, "response", None)):
        for name in ("status", "code", "status_code"):
            value = getattr(source, name, None)
            if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
                return int(value)
    return None
