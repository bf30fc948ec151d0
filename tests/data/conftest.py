"""A web server that fails as it is told to, and no waiting between attempts."""

from collections.abc import Iterator

import pytest

from clip_train.data import retries
from tests.data.failing_server import FailingServer, failing_server


@pytest.fixture
def server() -> Iterator[FailingServer]:
    with failing_server() as server:
        yield server


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.01)
