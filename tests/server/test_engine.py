"""The app on a real batch manager with a scripted runner, over real sockets where clients leave."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from medusa_serve.config import EngineConfig
from medusa_serve.engine.batch_manager import BatchManager
from medusa_serve.server.config import ServerConfig
from medusa_serve.types import SamplingParams

from ..fakes import EOS, FakeCodec, FakeRunner
from .standins import ask, error_of, events, generate, open_post, serving, unchunk, wait_for

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

HEALTH = {"method": "GET", "url": "/health"}


class FakeLLM:
    model_name = "fake"

    def __init__(self, runner: FakeRunner, **options: Any) -> None:
        self.codec = FakeCodec()
        self.runner = runner
        config = EngineConfig(max_queue=options.pop("max_queue", 64))
        self.manager = BatchManager(runner, self.codec, config, model_name="fake", close_s=2.0, **options)
        self.manager.start()

    def describe(self) -> dict[str, Any]:
        return {"model": self.model_name, "heads": "none", "max_context": self.runner.max_context}

    def close(self) -> None:
        self.manager.close()


@contextlib.contextmanager
def fake_llm(runner: FakeRunner | None = None, **options: Any) -> Iterator[FakeLLM]:
    llm = FakeLLM(runner or FakeRunner(), **options)
    try:
        yield llm
    finally:
        llm.close()


def health(llm: FakeLLM) -> httpx.Response:
    return ask(llm, HEALTH)[0]


def rest(llm: FakeLLM) -> bool:
    status = llm.manager.status()
    return status.running == status.waiting == 0 and not llm.runner.slots


def test_text_is_what_the_runner_says_in_both_forms() -> None:
    with fake_llm(FakeRunner(accept=(2, 0, 1), eos_ids=frozenset({EOS}))) as llm:
        body = {"prompt": "Hé", "max_tokens": 40, "return_token_ids": True}
        plain, streamed, chat = ask(
            llm,
            {"json": body},
            {"json": body | {"stream": True}},
            {"json": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}},
        )
    ids = llm.runner.solo(llm.codec.encode("Hé"), SamplingParams(), 40)
    answer = plain.json()
    assert (answer["token_ids"], answer["text"], answer["finish_reason"]) == (ids, llm.codec.decode(ids), "length")
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 40}
    assert 39 / answer["medusa"]["steps"] == pytest.approx(answer["medusa"]["acceptance"], abs=1e-4)
    got = events(streamed.text)
    assert "".join(event["text"] for event in got) == answer["text"]
    assert sum(n for event in got for n in event["tokens"]) == 40
    assert sum(n for event in got for n in event["accepted"]) == got[-1]["medusa"]["accepted"]
    assert len([n for event in got for n in event["tokens"]]) == got[-1]["medusa"]["steps"] + 1
    for name in ("model", "finish_reason", "token_ids", "usage", "medusa"):
        assert got[-1][name] == answer[name]
    assert chat.json()["usage"]["completion_tokens"] == 4


def test_many_streams_at_once_each_get_their_own_text() -> None:
    with fake_llm(FakeRunner(sleep_s=0.001)) as llm, serving(llm) as url:
        texts: dict[int, str] = {}

        def one(n: int) -> None:
            reply = httpx.post(f"{url}/generate", json={"prompt": f"p{n}", "max_tokens": 30, "stream": True})
            texts[n] = "".join(event["text"] for event in events(reply.text))

        threads = [threading.Thread(target=one, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        for n in range(12):
            ids = llm.runner.solo(llm.codec.encode(f"p{n}"), SamplingParams(), 30)
            assert texts[n] == llm.codec.decode(ids)


def test_over_the_context() -> None:
    with fake_llm(FakeRunner(max_context=16)) as llm:
        fits, prompt, both = ask(
            llm,
            {"json": {"prompt": "a" * 10, "max_tokens": 4}},
            {"json": {"prompt": "a" * 16}},
            {"json": {"prompt": "a" * 10, "max_tokens": 10, "stream": True}},
        )
    assert fits.status_code == 200
    for reply in (prompt, both):
        assert (reply.status_code, error_of(reply)["code"]) == (400, "context_length_exceeded")


def test_one_sequence_that_fails_ends_alone() -> None:
    with fake_llm(FakeRunner(nan=ord("!"))) as llm:
        bad, good = ask(llm, {"json": {"prompt": "!"}}, {"json": {"prompt": "a", "max_tokens": 3}})
        stream = generate(llm, {"prompt": "!", "stream": True})
    assert (bad.status_code, error_of(bad)["code"]) == (500, "generation_failed")
    assert good.status_code == 200
    assert stream.status_code == 200
    assert events(stream.text)[-1]["error"]["code"] == "generation_failed"


def test_a_full_queue_is_429_at_once() -> None:
    gate = threading.Event()
    runner = FakeRunner(num_slots=1, before=lambda kind, slots: gate.wait(10) and None)
    with fake_llm(runner, max_queue=1) as llm, serving(llm) as url:
        held = [open_post(url, {"prompt": "a", "max_tokens": 2}) for _ in range(2)]
        wait_for(lambda: llm.manager.status().running + llm.manager.status().waiting == 2)
        reply = httpx.post(f"{url}/generate", json={"prompt": "a"})
        gate.set()
        assert (reply.status_code, error_of(reply)["code"]) == (429, "queue_full")
        assert reply.headers["retry-after"] == "1"
        for sock in held:
            assert b" 200 " in sock.recv(65536)
            sock.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_within_two_steps(stream: bool) -> None:
    left = threading.Event()
    steps_after: list[str] = []

    def before(kind: str, slots: list[int]) -> None:
        time.sleep(0.05)  # a step is far longer than it takes to notice
        if left.is_set():
            steps_after.append(kind)

    with fake_llm(FakeRunner(before=before)) as llm, serving(llm) as url:
        sock = open_post(url, {"prompt": "a", "max_tokens": 2000, "stream": stream})
        wait_for(lambda: len(llm.runner.calls) > 3)
        left.set()
        sock.close()
        wait_for(lambda: rest(llm))
    assert len(steps_after) <= 2


def test_clients_that_leave_while_waiting() -> None:
    with fake_llm(FakeRunner(num_slots=1, sleep_s=0.01)) as llm, serving(llm) as url:
        socks = [open_post(url, {"prompt": "a", "max_tokens": 1000, "stream": n % 2 == 0}) for n in range(8)]
        wait_for(lambda: llm.manager.status().waiting == 7)
        for sock in socks:
            sock.close()
        wait_for(lambda: rest(llm))
        assert httpx.post(f"{url}/generate", json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_health_idle_and_slow_step() -> None:
    gate = threading.Event()
    with fake_llm(FakeRunner(before=lambda kind, slots: gate.wait(0.4) and None)) as llm, serving(llm) as url:
        reply = httpx.get(f"{url}/health")
        assert reply.status_code == 200
        assert reply.json() == {
            "model": "fake",
            "heads": "none",
            "max_context": 4096,
            "status": "ok",
            "running": 0,
            "waiting": 0,
        }
        sock = open_post(url, {"prompt": "a", "max_tokens": 2})
        wait_for(lambda: llm.manager.status().running == 1)
        slow = httpx.get(f"{url}/health")
        assert (slow.status_code, slow.json()["running"]) == (200, 1)
        gate.set()
        sock.recv(65536)
        sock.close()


def test_health_of_a_step_that_hangs() -> None:
    gate = threading.Event()
    runner = FakeRunner(before=lambda kind, slots: gate.wait(10) and None)
    with fake_llm(runner, stall_s=0.05) as llm, serving(llm) as url:
        sock = open_post(url, {"prompt": "a", "max_tokens": 2})
        wait_for(lambda: httpx.get(f"{url}/health").json()["status"] == "stalled")
        reply = httpx.get(f"{url}/health")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        assert reply.json()["message"]
        gate.set()
        assert b" 200 " in sock.recv(65536)
        sock.close()
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)


def test_an_engine_that_starts_again_and_one_that_is_gone() -> None:
    errors = [SystemExit(), RuntimeError("CUDA error: device-side assert triggered")]

    def before(kind: str, slots: list[int]) -> None:
        raise errors.pop(0)

    with fake_llm(FakeRunner(before=before)) as llm, serving(llm) as url:

        def post(**fields: Any) -> httpx.Response:
            return httpx.post(f"{url}/generate", json={"prompt": "a", "max_tokens": 2} | fields)

        first = post()
        assert (first.status_code, error_of(first)["code"]) == (503, "engine_restarting")
        assert first.headers["retry-after"] == "5"
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        stream = post(stream=True)
        later, state = post(), httpx.get(f"{url}/health")
    assert (stream.status_code, events(stream.text)[-1]["error"]["code"]) == (200, "engine_dead")
    assert (later.status_code, error_of(later)["code"]) == (503, "engine_dead")
    assert later.headers["x-should-retry"] == "false"
    assert (state.status_code, state.json()["status"]) == (503, "failed")
    assert "restart the runtime" in state.json()["message"]


def test_while_it_drains() -> None:
    with fake_llm(FakeRunner(sleep_s=0.01)) as llm, contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(llm, ServerConfig(port=0, drain_s=0.5)))
        sock = open_post(url, {"prompt": "a", "max_tokens": 3000, "stream": True})
        wait_for(lambda: llm.manager.status().running == 1)
        began = time.monotonic()
        stopping = threading.Thread(target=stack.close)
        stopping.start()
        wait_for(lambda: llm.manager.status().state == "draining")
        state = httpx.get(f"{url}/health")
        refused = httpx.post(f"{url}/generate", json={"prompt": "a"})
        raw = b""
        while data := sock.recv(65536):
            raw += data
        sock.close()
        stopping.join(10)
        assert time.monotonic() - began < 3
    assert (state.status_code, state.json()["status"], state.headers["retry-after"]) == (503, "draining", "5")
    assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
    got = events(unchunk(raw.partition(b"\r\n\r\n")[2]).decode())
    assert got[-1]["error"]["code"] == "shutting_down"
    assert got[0]["text"]


def test_a_short_request_finishes_within_the_drain() -> None:
    with fake_llm(FakeRunner(sleep_s=0.01)) as llm, contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(llm, ServerConfig(port=0, drain_s=5)))
        sock = open_post(url, {"prompt": "a", "max_tokens": 30})
        wait_for(lambda: llm.manager.status().running == 1)
        stack.close()
        assert b'"completion_tokens":30' in sock.recv(65536)
        sock.close()
