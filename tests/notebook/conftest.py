"""A folder with a tiny model, and a check that no test leaves a server running."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from medusa_serve.notebook.background import running
from tests.tiny import save_tiny_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Stops what the test left running, and checks that its threads are gone."""
    yield
    server = running()
    if server is not None:
        server.stop()
    assert threads() == []


@pytest.fixture(scope="module")
def server(folder: str) -> Iterator[Any]:
    """One server for the tests of a file that do not change it."""
    import medusa_serve

    made = medusa_serve.launch(folder, heads="none", port=0, panel=False, max_context=128)
    yield made
    made.stop()
    assert threads() == []


def threads() -> list[str]:
    """Ours, of which a server has exactly a web server's and an engine's."""
    names = ("medusa-server", "medusa-engine", "medusa-load", "medusa-panel")
    return sorted(thread.name for thread in threading.enumerate() if thread.name in names)
