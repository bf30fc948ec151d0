"""A Google Cloud Storage server on localhost, known by the environment as its emulators are."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from gcp_storage_emulator.server import create_server
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from clip_train.data import remote


@contextmanager
def gcs_server() -> Iterator[storage.Client]:
    """Run a server on a free port; gives a client of it."""
    server = create_server("127.0.0.1", 0, in_memory=True)
    with server, pytest.MonkeyPatch.context() as patch:
        assert server._api._httpd  # which alone knows the port
        use_gcs(f"http://127.0.0.1:{server._api._httpd.server_port}", patch)
        yield storage.Client(project="test", credentials=AnonymousCredentials())


def use_gcs(url: str, patch: pytest.MonkeyPatch) -> None:
    """Look for buckets there, without credentials."""
    patch.setenv("STORAGE_EMULATOR_HOST", url)
    patch.setenv("NO_GCE_CHECK", "true")  # no search for credentials on the network
    patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    remote._make_filesystem.cache_clear()  # those that know another server
