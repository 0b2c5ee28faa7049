"""The server answers while the model loads, and says so when it cannot be loaded."""

import threading
from typing import Any

import pytest

from medusa_serve.errors import LoadError, ModelLoading, ShuttingDown
from medusa_serve.server.background_load import BackgroundLoad
from medusa_serve.server.config import ServerConfig

from .standins import HandLLM, ask, error_of

HEALTH = {"method": "GET", "url": "/health"}
POST = {"json": {"prompt": "a"}}


def test_loading_then_ready() -> None:
    gate, llm = threading.Event(), HandLLM()

    def factory() -> Any:
        gate.wait(5)
        return llm

    load = BackgroundLoad(factory)
    health, post, bad = ask(load, HEALTH, POST, {"json": {"prompt": 5}})
    assert (health.status_code, health.json()["status"], health.headers["retry-after"]) == (503, "loading", "5")
    assert (post.status_code, error_of(post)["code"], post.headers["retry-after"]) == (503, "model_loading", "5")
    assert bad.status_code == 400
    assert load.state == "loading"
    with pytest.raises(ModelLoading):
        load.get()
    gate.set()
    assert load.wait(5)
    assert load.state == "ready"
    assert load.get() is llm
    assert [r.status_code for r in ask(load, HEALTH, POST)] == [200, 200]
    load.close()
    load.close()
    assert llm.closed
    health, post = ask(load, HEALTH, POST)
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    assert (post.status_code, error_of(post)["code"]) == (503, "shutting_down")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(LoadError("No such model; try another."), "No such model; try another."), (KeyError("x"), "KeyError: 'x'")],
)
def test_failed(error: Exception, reason: str) -> None:
    def factory() -> Any:
        raise error

    load = BackgroundLoad(factory)
    assert load.wait(5)
    assert load.state == "failed"
    with pytest.raises(LoadError, match=reason):
        load.get()
    health, post = ask(load, HEALTH, POST)
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert (post.status_code, error_of(post)["code"], post.headers["x-should-retry"]) == (503, "engine_dead", "false")
    assert "retry-after" not in post.headers
    assert reason in post.json()["error"]["message"]
    assert reason in health.json()["message"]
    (public,) = ask(load, HEALTH, config=ServerConfig(api_key="k"))
    assert reason not in public.text


def test_closed_while_loading() -> None:
    gate, llm = threading.Event(), HandLLM()

    def factory() -> Any:
        gate.wait(5)
        return llm

    load = BackgroundLoad(factory)
    load.close()
    assert load.state == "closed"
    gate.set()
    load.wait(5)
    with pytest.raises(ShuttingDown):
        load.get()
    for thread in threading.enumerate():
        if thread.name == "medusa-load":
            thread.join(5)
    assert llm.closed
