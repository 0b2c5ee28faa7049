"""bench/invariants.py: a server at rest holds them all, and each sees what is planted for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medusa_serve.server.config import ServerConfig
from tests.campaigns import invariants as module
from tests.campaigns.http_load import Sample, Target, closed_loop
from tests.campaigns.invariants import Invariants
from tests.server.standins import running, serving
from tests.server.test_engine import FakeLLM, fake_llm

KEY = "the-owner's-key"
WHOLE = Sample(0.0, 0.1, 0.2, 6, "200", 1, 1)


@contextlib.contextmanager
def invariants(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Invariants, str]]:
    """Impatient ones, of a real server over `llm` at the URL."""
    monkeypatch.setattr(module, "AUDIT_S", 0.05)
    monkeypatch.setattr(module, "REST_S", 0.5)
    monkeypatch.setattr(module, "SETTLE_S", 0.3)
    monkeypatch.setattr("medusa_serve.engine.batch_manager.IDLE_WAIT_S", 0.01)
    with serving(llm, ServerConfig(port=0, api_key=KEY)) as url:
        made = Invariants(llm, url, running(url).servers[0].get_loop(), KEY)
        with contextlib.closing(made):
            yield made, url


def test_a_server_at_rest_holds_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_llm() as llm, invariants(llm, monkeypatch) as (made, url):
        target = Target(url, ["Hello"], 5, chat=False, key=KEY)
        closed_loop(target, 4, 0, 8, 0.0)
        made.begin()
        for start in (8, 16):  # what is counted is counted anew each time
            told = made.check(closed_loop(target, 4, start, 8, 0.0))
            assert told["broken"] == []
            assert told["held"]
            assert told["canary_s"] < 5


def lose_a_slot(llm: FakeLLM) -> None:
    llm.manager._scheduler._free.discard(2)


def miscount(llm: FakeLLM) -> None:
    llm.manager.metrics.submitted()


def say_something_else(llm: FakeLLM) -> None:
    llm.runner.next_token = lambda ids, params: 260


def say_nothing(llm: FakeLLM) -> None:
    """The canary is told that it failed, though /health is fine."""
    llm.runner.nan = llm.codec.encode("T")[-1]


def forget_an_exception(llm: FakeLLM) -> None:
    logging.getLogger("asyncio").error("Task exception was never retrieved")


def log(text: str) -> Callable[[FakeLLM], None]:
    return lambda llm: logging.getLogger("medusa_serve.engine").warning("It failed: %s", text)


BROKEN: dict[str, tuple[Callable[[FakeLLM], None], list[str]]] = {
    "a request without an outcome": (miscount, ["I1: 1 requests are open", "I2: 0 of 0 clients were answered"]),
    "a lost slot": (lose_a_slot, ["I3: the engine is ok after 1 restarts"]),
    "another text": (say_something_else, ["I6: the canary said"]),
    "no text": (say_nothing, ["I6: the canary said None", "I8: /health says 200"]),
    "an exception": (forget_an_exception, ["I7: 1 log lines, the first at ['asyncio']"]),
    "a logged prompt": (log(f"prompt={module.CANARY}"), ["I7: 1 log lines"]),
    "a logged key": (log(f"x-api-key: {KEY}"), ["I7: 1 log lines"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_planted_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, told = BROKEN[name]
    with fake_llm() as llm, invariants(llm, monkeypatch) as (made, _):
        assert made.check([])["held"]
        plant(llm)
        seen = made.check([])
        assert not seen["held"]
        assert [one[: len(start)] for one, start in zip(seen["broken"], told, strict=True)] == told


def test_answers_with_more_or_less_than_one_end_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_llm() as llm, invariants(llm, monkeypatch) as (made, url):
        target = Target(url, ["Hello"], 5, chat=False, key=KEY)
        for bad in (WHOLE._replace(terminals=2), WHOLE._replace(dones=0), WHOLE._replace(status="cut", terminals=0)):
            [good] = closed_loop(target, 1, 0, 1, 0.0)
            assert good == good._replace(terminals=1, dones=1)
            assert made.check([good, bad])["broken"][0].startswith("I2: 1 answers without exactly one end")
        for samples in ([WHOLE], [WHOLE, WHOLE._replace(status="left")]):  # of which the engine knows nothing
            assert made.check(samples)["broken"][0].startswith(f"I2: 1 of {len(samples)} clients were answered")
        closed_loop(target, 1, 0, 2, 0.0)
        assert made.check([WHOLE])["broken"] == ["I2: 1 of 1 clients were answered, 0 left, 2 were accepted"]


def test_what_is_left_behind_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with fake_llm() as llm, invariants(llm, monkeypatch) as (made, _), contextlib.ExitStack() as stack:
        loop, over = made._loop, threading.Event()
        # three: while answers are watched there is a task for that, and it may have been there at the beginning
        tasks = [asyncio.run_coroutine_threadsafe(asyncio.sleep(60), loop) for _ in range(3)]
        threads = [threading.Thread(target=over.wait, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(3):
            stack.enter_context((tmp_path / str(number)).open("w"))
        broken = made.check([])["broken"]
        assert [re.sub(r"\d+", "…", one) for one in broken] == [
            "I…: … tasks, not …",
            "I…: … threads, not …",
            "I…: … open files, not …",
        ]
        for task in tasks:
            task.cancel()
        over.set()
        for thread in threads:
            thread.join()


def test_what_grows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_llm() as llm, invariants(llm, monkeypatch) as (made, _):
        used = made._used_mb()
        monkeypatch.setattr(made, "_used_mb", lambda: used + 30)
        assert made.check([])["broken"] == ["I5: 30 and 0 MB more"]
        monkeypatch.setattr(made, "_used_mb", lambda: used)
        monkeypatch.setattr(module, "_device_mb", lambda llm: 2.0)
        assert made.check([])["broken"] == ["I5: 0 and 2 MB more"]
