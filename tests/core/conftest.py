"""A server for the tests of what asks one."""

from __future__ import annotations

import pytest
from serving import Server


@pytest.fixture
def server(monkeypatch):
    """A running `serving.Server`."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    yield running
    running.close()
