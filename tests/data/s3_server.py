"""An S3 server on localhost, known by the environment as a user's would be."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from clip_train.data import remote


@contextmanager
def s3_server() -> Iterator[Any]:
    """Run a server on a free port; gives a client of it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        use_s3(f"http://{host}:{port}", patch)
        yield boto3.client("s3")
    server.stop()


def use_s3(url: str, patch: pytest.MonkeyPatch) -> None:
    """Look for buckets there."""
    patch.setenv("AWS_ENDPOINT_URL", url)
    patch.setenv("AWS_ACCESS_KEY_ID", "testing")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    remote._make_filesystem.cache_clear()  # those that know another server
