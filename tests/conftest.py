"""All tests run against a Hub on loopback: no test can reach the real one, and pushing and loading need no network.

The client reads its settings when it is imported, so they are set here, before any test module is.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import HubServer


_HUB = HubServer()
_HOME = tempfile.TemporaryDirectory(prefix="hub-home-")
os.environ.update(_HUB.environment(_HOME.name))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: processes that share the files are done at about the same time then."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def hub() -> HubServer:
    """The Hub of this test run, which tests share: each takes repositories of its own names."""
    return _HUB


@pytest.fixture(scope="session", autouse=True)
def _hub_is_served() -> Iterator[None]:
    with _HUB:
        yield
    _HOME.cleanup()


@pytest.fixture
def fresh_home(tmp_path: Path, hub: HubServer) -> dict[str, str]:
    """The environment of a new process with an empty cache."""
    return {**os.environ, **hub.environment(tmp_path / "home")}
