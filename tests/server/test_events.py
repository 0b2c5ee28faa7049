"""Events go out at once on a fast socket and merged on a slow one; a client that leaves is noticed."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from medusa_serve.errors import ShuttingDown
from medusa_serve.server.api.generate import GenerateFormat
from medusa_serve.server.app import create_app
from medusa_serve.server.config import ServerConfig
from medusa_serve.server.events import EventStream
from medusa_serve.server.router import DeltaRouter, OpenSequences
from medusa_serve.types import Delta, SamplingParams

from .standins import HandLLM, HandManager, completion, events, open_post, serving, unchunk, wait_for

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

Send = Callable[[Any], Any]


async def never() -> Any:
    await asyncio.Event().wait()


def stream_by_hand(
    play: Callable[[HandManager], Any], send: Send, *, merge_s: float = 0.02, pace_s: float = 0.0, num_open: int = 1
) -> list[str]:
    """Run one EventStream whose deltas `play` (a coroutine function) pushes; the bodies sent."""
    bodies: list[str] = []

    async def collect(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"].decode())
        await send(message)

    async def go() -> None:
        manager, router = HandManager(None), DeltaRouter()
        sequences = OpenSequences()
        router.submit(manager, [1], SamplingParams(), key="", sequences=sequences)
        answer_format = GenerateFormat(token_ids=False)
        stream = EventStream(sequences, answer_format, merge_s=merge_s, pace_s=pace_s, num_open=lambda: num_open)
        await asyncio.gather(stream({}, never, collect), play(manager))
        assert router.num_open == 0

    asyncio.run(go())
    return bodies


async def at_once(_: Any) -> None:
    pass


def step(n: int) -> Delta:
    return Delta(f"{n};", (1,), (0,), (n,))


def last(text: str, n: int) -> Delta:
    return Delta(f"{n};", (1,), (0,), (n,), completion=completion("seq-0", text))


def test_a_fast_socket_gets_each_step_at_once() -> None:
    seen: list[float] = []

    async def note(_: Any) -> None:
        seen.append(time.monotonic())

    pushed = []

    async def play(manager: HandManager) -> None:
        for n in range(10):
            await asyncio.sleep(0.005)
            pushed.append(time.monotonic())
            manager.push("seq-0", step(n) if n < 9 else last("", 9))

    bodies = stream_by_hand(play, note)
    assert len(bodies) == 10
    delays = sorted(b - a for a, b in zip(pushed, seen[1:], strict=True))
    assert delays[7] < 0.015  # under merge_ms, with room for a busy machine


def test_a_slow_socket_gets_merged_events_with_nothing_lost() -> None:
    async def slow(message: Any) -> None:
        await asyncio.sleep(0.03)

    async def play(manager: HandManager) -> None:
        for n in range(99):
            manager.push("seq-0", step(n))
            await asyncio.sleep(0.002)
        manager.push("seq-0", last("", 99))

    bodies = stream_by_hand(play, slow)
    assert len(bodies) < 30
    got = events("".join(bodies))
    assert "".join(event["text"] for event in got) == "".join(f"{n};" for n in range(100))
    assert sum((event["tokens"] for event in got), []) == [1] * 100
    assert max(len(event["tokens"]) for event in got) > 3
    assert got[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(("pace_s", "num_open"), [(0.03, 1), (0.0, 60), (0.03, 2)])
def test_events_of_one_answer_keep_a_distance(pace_s: float, num_open: int) -> None:
    """The first one goes out at once; what comes within the distance, which grows with the answers that are open, is
    merged, and nothing is lost."""
    sent: list[float] = []

    async def note(_: Any) -> None:
        sent.append(time.monotonic())

    async def play(manager: HandManager) -> None:
        for n in range(99):
            manager.push("seq-0", step(n))
            await asyncio.sleep(0.001)
        manager.push("seq-0", last("", 99))

    bodies = stream_by_hand(play, note, pace_s=pace_s, num_open=num_open)
    got = events("".join(bodies))
    assert got[0]["tokens"] == [1]
    assert "".join(event["text"] for event in got) == "".join(f"{n};" for n in range(100))
    assert all(later - earlier > 0.029 for earlier, later in zip(sent[1:-1], sent[2:-1], strict=False))


def test_an_end_does_not_keep_the_distance() -> None:
    async def play(manager: HandManager) -> None:
        manager.push("seq-0", step(0))
        await asyncio.sleep(0.05)
        manager.push("seq-0", last("", 1))

    began = time.monotonic()
    assert len(stream_by_hand(play, at_once, pace_s=5.0)) == 2
    assert time.monotonic() - began < 2.0


def test_after_a_lag_a_delta_is_held_no_longer_than_merge_ms() -> None:
    sent: list[float] = []

    async def lag_once(message: Any) -> None:
        if len(sent) == 1:  # the first event
            await asyncio.sleep(0.05)
        sent.append(time.monotonic())

    async def play(manager: HandManager) -> None:
        manager.push("seq-0", step(0))
        await asyncio.sleep(0.051)
        manager.push("seq-0", step(1))
        await asyncio.sleep(0.5)
        manager.push("seq-0", last("", 2))

    assert len(stream_by_hand(play, lag_once)) == 3
    assert sent[2] - sent[1] < 0.2


def test_held_back_text_still_tells_its_tokens() -> None:
    answer_format = GenerateFormat(token_ids=False)
    assert answer_format.events(0, Delta("", (3,), (2,))) == [{"text": "", "tokens": [3], "accepted": [2]}]
    assert answer_format.events(0, Delta("")) == []
    assert answer_format.events(0, Delta("", error=ShuttingDown("Stopping."))) == []
    assert answer_format.events(0, Delta("a", (1,), (0,), error=ShuttingDown("Stopping.")))[0]["text"] == "a"


def test_steps_of_one_call_reach_their_own_requests() -> None:
    async def go() -> None:
        manager, router = HandManager(None), DeltaRouter()
        first, second = OpenSequences(), OpenSequences()
        one, two = (router.submit(manager, [1], SamplingParams(), key="", sequences=own) for own in (first, second))
        assert manager.sinks["seq-0"] is manager.sinks["seq-1"]
        router.sink([("seq-1", step(1)), ("seq-0", step(0)), ("unknown", step(5))])
        assert [(await own.take())[0][1].text for own in (first, second)] == ["0;", "1;"]
        router.sink([("seq-0", last("", 3))])
        await first.take()
        one.close()
        two.close()
        two.close()
        assert manager.cancelled == ["seq-1"]
        router.sink([("seq-1", step(2))])  # too late: dropped
        await asyncio.sleep(0)
        assert router.num_open == 0

    asyncio.run(go())


def test_a_dismissed_sequence_has_had_its_last_word() -> None:
    async def go() -> None:
        manager, router = HandManager(None), DeltaRouter()
        sequences = OpenSequences()
        router.submit(manager, [1], SamplingParams(), key="", sequences=sequences)
        manager.push("seq-0", step(0))  # under way to the loop
        router.dismiss(ShuttingDown("Stopping."))
        await asyncio.sleep(0.01)
        [(_, delta)] = await sequences.take()
        assert delta.error is not None
        router.dismiss(ShuttingDown("Stopping."))
        sequences.close()
        assert manager.cancelled == ["seq-0"]

    asyncio.run(go())


def test_a_sink_without_a_loop_is_silent() -> None:
    router, manager = DeltaRouter(), HandManager(None)

    async def go() -> None:
        router.submit(manager, [1], SamplingParams(), key="", sequences=OpenSequences())

    asyncio.run(go())
    router.sink([("seq-0", step(0))])


# ---- real sockets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["before", "midway"])
def test_a_client_that_leaves_is_cancelled_at_once(stream: bool, when: str) -> None:
    manager = HandManager(None)
    with serving(HandLLM(manager)) as url:
        sock = open_post(url, {"prompt": "a", "stream": stream})
        wait_for(lambda: manager.sinks)
        if when == "midway":
            manager.push("seq-0", step(0))
            if stream:
                raw = b""
                while b"0;" not in raw:
                    raw += sock.recv(65536)
        assert manager.cancelled == []
        left = time.monotonic()
        sock.close()
        wait_for(lambda: manager.cancelled == ["seq-0"])
        assert time.monotonic() - left < 0.5


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_after_the_end_cancels_nothing(stream: bool) -> None:
    manager = HandManager()
    with serving(HandLLM(manager)) as url:
        assert httpx.post(f"{url}/generate", json={"prompt": "a", "stream": stream}).status_code == 200
        time.sleep(0.05)
    assert manager.cancelled == []


def test_the_first_event_does_not_wait_for_the_second() -> None:
    manager = HandManager(None)
    body = {"prompt": "a", "stream": True}
    with serving(HandLLM(manager)) as url, httpx.stream("POST", f"{url}/generate", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        manager.push("seq-0", step(0))
        assert json.loads(next(lines).removeprefix("data: "))["text"] == "0;"
        manager.push("seq-0", last("", 1))
        assert "".join(lines).endswith("data: [DONE]")


def test_a_reader_that_stops_reading_holds_one_delta_and_loses_nothing() -> None:
    manager, pad = HandManager(None), "x" * 2000
    with serving(HandLLM(manager)) as url:
        sock = open_post(url, {"prompt": "a", "stream": True}, receive_buffer=4096)
        wait_for(lambda: manager.sinks)
        for n in range(3000):  # 6 MB: more than the buffers of both ends hold
            manager.push("seq-0", Delta(f"{n};{pad}", (1,), (0,)))
            if n % 50 == 0:
                time.sleep(0.001)
        manager.push("seq-0", last("", 3000))
        raw = b""
        while b"[DONE]" not in raw[-100:]:
            raw += sock.recv(1 << 20)
        sock.close()
    head, _, chunked = raw.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    got = events(unchunk(chunked).decode())
    assert len(got) < 3000
    assert "".join(event["text"] for event in got) == "".join(f"{n};{pad}" for n in range(3000)) + "3000;"
    assert sum(len(event["tokens"]) for event in got) == 3001


def test_two_loops_may_use_one_app_after_each_other() -> None:
    app = create_app(HandLLM(), ServerConfig())

    async def go() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return (await client.post("/generate", json={"prompt": "a"})).status_code

    assert [asyncio.run(go()), asyncio.run(go())] == [200, 200]


def test_stop_ends_what_the_engine_does_not() -> None:
    """The stand-in's drain ends nothing, as that of an engine that hangs."""
    manager = HandManager(None)
    config = ServerConfig(port=0, drain_s=0.1)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(HandLLM(manager), config))
        sock = open_post(url, {"prompt": "a", "stream": True})
        wait_for(lambda: manager.sinks)
        manager.push("seq-0", step(0))
        began = time.monotonic()
        stack.close()  # stops the server
        assert time.monotonic() - began < 3
        raw = b""
        while data := sock.recv(65536):
            raw += data
        sock.close()
    got = events(unchunk(raw.partition(b"\r\n\r\n")[2]).decode())
    assert [event.get("text") for event in got] == ["0;", None]
    assert got[-1]["error"]["code"] == "shutting_down"
    assert manager.cancelled == ["seq-0"]


def test_a_reader_that_stops_reading_does_not_hold_up_the_stop() -> None:
    manager = HandManager(None)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(HandLLM(manager), ServerConfig(port=0, drain_s=0.1)))
        sock = open_post(url, {"prompt": "a", "stream": True}, receive_buffer=4096)
        wait_for(lambda: manager.sinks)
        for _ in range(20):  # merged, each costs what is there already
            manager.push("seq-0", Delta("x" * 500_000, (1,), (0,)))
        time.sleep(0.1)
        began = time.monotonic()
        stack.close()
        assert time.monotonic() - began < 5
        sock.close()
    assert manager.cancelled == ["seq-0"]
