"""An engine that failed, or a step of which hangs: every reader says so, and running the cell again replaces it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import medusa_serve
from medusa_serve import llm
from medusa_serve.engine.batch_manager import BatchManager
from medusa_serve.errors import EngineDead, EngineStalled
from medusa_serve.notebook.panel.panel import Panel

from .conftest import threads

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")
pytest.importorskip("ipywidgets", reason="the panel is made of ipywidgets")

ONE = ["medusa-engine", "medusa-server"]


def launch(folder: str) -> Any:
    return medusa_serve.launch(folder, heads="none", panel=False, port=0, max_context=128)


@pytest.fixture
def first_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives the next engine, and no later one, a runner with this `decode`. options: the batch manager's"""

    def broken(decode: Callable[..., Any], **options: float) -> None:
        def manager(runner: Any, *args: Any, **named: Any) -> BatchManager:
            monkeypatch.undo()
            runner.decode = decode
            return BatchManager(runner, *args, **named, **options)

        monkeypatch.setattr(llm, "BatchManager", manager)

    return broken


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Set at the end of a test at the latest, so that no step hangs for longer."""
    made = threading.Event()
    yield made
    made.set()


def says(server: Any, status: str, sentence: str) -> None:
    """Its health, its metrics and its panel."""
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()["status"]) == (503, status)
    assert sentence in health.json()["message"]
    assert "medusa_serve_up 0.0" in httpx.get(f"{server.url}/metrics").text
    assert not server.is_alive
    assert sentence in server.trouble
    panel = Panel(server, blocking=True)
    panel._controls.prompt.value = "a"
    panel._controls.send.click()
    assert sentence in panel._controls.note.value
    panel.close()


def replaced(folder: str, old: Any, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The cell that runs again says why, and serves."""
    capsys.readouterr()
    again = launch(folder)
    shown = capsys.readouterr().out
    assert again is not old
    assert f"tiny does not serve any more: {sentence}" in shown
    assert "replacing tiny" in shown
    assert again.generate("a", max_tokens=2).completion_tokens == 2
    assert httpx.get(f"{again.url}/health").json()["status"] == "ok"
    assert launch(folder) is again


@pytest.mark.usefixtures("nothing_left")
def test_an_engine_that_failed(
    folder: str, first_engine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def decode(slots: Any, nodes: int) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    first_engine(decode)
    server = launch(folder)
    assert server.is_alive
    with pytest.raises(EngineDead, match="restart the runtime"):
        server.generate("a", max_tokens=4)
    says(server, "failed", "restart the runtime")
    replaced(folder, server, "The device met an error", capsys)
    assert threads() == ONE


@pytest.mark.usefixtures("nothing_left")
def test_a_step_that_hangs(
    folder: str, gate: threading.Event, first_engine: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def decode(slots: Any, nodes: int) -> Any:
        gate.wait(60)
        raise RuntimeError("it went on, too late")

    first_engine(decode, stall_s=0.2, close_s=0.2)
    server = launch(folder)
    stream = server.stream("a", max_tokens=4)
    next(stream)  # prefill's; the next step hangs
    [hung] = [thread for thread in threading.enumerate() if thread.name == "medusa-engine"]
    until = time.monotonic() + 10
    while server.is_alive and time.monotonic() < until:
        time.sleep(0.05)
    with pytest.raises(EngineStalled, match="running for"):
        server.generate("a", max_tokens=4)
    says(server, "stalled", "A step has been running for")
    replaced(folder, server, "A step has been running for", capsys)
    stream.close()
    gate.set()
    hung.join(10)
    assert threads() == ONE
