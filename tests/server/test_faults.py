"""Faults put into a server that is in use (F1 to F9, F11, F13, F15): each accepted request gets exactly one last word,
the others go on, and afterwards everything is as before (I1 to I8)."""

import contextlib
import logging
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from medusa_serve.errors import InvalidConfig
from medusa_serve.server.config import ServerConfig
from medusa_serve.server.listen import bind
from medusa_serve.server.router import OpenSequence
from medusa_serve.types import Delta, SamplingParams

from ..fakes import FakeRunner
from .invariants import Baseline, Told, told
from .standins import open_post, running, serving, wait_for
from .test_engine import FakeLLM, fake_llm

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

Hook = Callable[[str, list[int]], None]


class OutOfMemoryError(RuntimeError):
    """By the name that torch gives it."""


@contextlib.contextmanager
def served(
    config: ServerConfig | None = None, engine: dict[str, Any] | None = None, **options: Any
) -> Iterator[tuple[FakeLLM, str, Baseline]]:
    """A server over a scripted runner of 8 slots, its URL, and what must hold again at the end, which is checked."""
    runner = FakeRunner(**({"num_slots": 8, "accept": (0, 2), "sleep_s": 0.001} | options))
    with fake_llm(runner, **(engine or {})) as llm, serving(llm, config or ServerConfig(port=0, drain_s=0.5)) as url:
        baseline = Baseline(llm, url)
        try:
            yield llm, url, baseline
        finally:
            baseline.close()


def post(url: str, prompt: str, max_tokens: int = 20, stream: bool = False) -> Told:
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": stream}
    return told(httpx.post(f"{url}/generate", json=body, timeout=30))


def together(url: str, prompts: list[str], max_tokens: int = 20) -> list[Told]:
    """All at once, every other one streamed."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        jobs = [pool.submit(post, url, prompt, max_tokens, n % 2 == 0) for n, prompt in enumerate(prompts)]
        return [job.result() for job in jobs]


def solo(llm: FakeLLM, prompt: str, max_tokens: int = 20) -> str:
    return llm.codec.decode(llm.runner.solo(llm.codec.encode(prompt), SamplingParams(), max_tokens))


PROMPTS = [f"request {n}" for n in range(8)]


def once_at(count: int, error: Callable[[], BaseException], kind: str = "") -> Hook:
    """Raise at the count-th call of the runner (of this kind)."""
    calls = 0

    def before(called: str, slots: list[int]) -> None:
        nonlocal calls
        calls += called.startswith(kind)
        if calls == count and called.startswith(kind):
            calls += 1
            raise error()

    return before


@pytest.mark.parametrize("step", [1, 2, 9, 17, 50])
def test_f1_the_engine_raises(step: int) -> None:
    with served() as (llm, url, baseline):
        llm.runner.before = once_at(step, SystemExit)
        began = time.monotonic()
        answers = together(url, PROMPTS, 60)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            if answer.code is None:  # it had ended before
                assert answer.text == solo(llm, prompt, 60)
            else:
                assert answer.code == "engine_restarting"
                assert answer.status in (200, 503)
        assert any(answer.code for answer in answers)
        assert time.monotonic() - began < 2 + 2
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200, 5)
        llm.runner.before = None
        baseline.check()
        assert llm.manager.metrics.snapshot()["restarts"] == 1


def test_f2_the_engine_hangs() -> None:
    gate = threading.Event()
    with served(engine={"stall_s": 0.3}) as (llm, url, baseline):
        llm.runner.before = lambda kind, slots: gate.wait(20) and None
        began = time.monotonic()
        answers = together(url, PROMPTS)
        assert time.monotonic() - began < 3
        assert {answer.code for answer in answers} == {"engine_stalled"}
        assert httpx.get(f"{url}/health").json()["status"] == "stalled"
        assert post(url, "a newcomer").code == "engine_stalled"
        llm.runner.before = None
        gate.set()
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        baseline.check()


@pytest.mark.parametrize("fault", ["poison", "nan"])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_f3_f6_one_bad_request_of_eight(fault: str, place: int) -> None:
    """F3: the pass raises whenever that sequence is in it. F6: its numbers are not finite."""
    with served(accept=(0, 3)) as (llm, url, baseline):
        setattr(llm.runner, fault, ord("!"))
        prompts = [prompt + "!" * (n == place) for n, prompt in enumerate(PROMPTS)]
        for n, answer in enumerate(together(url, prompts)):
            if n == place:
                assert (answer.code, answer.text) == ("generation_failed", "")
                assert answer.status == (200 if n % 2 == 0 else 500)
            else:
                assert (answer.status, answer.code, answer.text) == (200, None, solo(llm, prompts[n]))
        baseline.check()


@pytest.mark.parametrize("times", [1, 2, 10])
def test_f4_out_of_memory(times: int) -> None:
    """Once: nobody notices. Again and again: at most one request for each error, and it may be sent again."""
    left, raised = [0], []

    def before(kind: str, slots: list[int]) -> None:
        if kind == "decode" and left[0]:
            left[0] -= 1
            raised.append(len(slots))
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with served() as (llm, url, baseline):
        llm.runner.before, left[0] = before, times
        answers = together(url, PROMPTS)
        failed = [answer for answer in answers if answer.code]
        assert {answer.code for answer in failed} <= {"out_of_memory"}
        assert len(failed) <= (0 if times == 1 else len(raised))
        assert all(a.text == solo(llm, p) for a, p in zip(answers, PROMPTS, strict=True) if not a.code)
        assert left == [0]
        baseline.check()
        assert llm.manager.metrics.snapshot()["restarts"] == 0


def test_f5_a_device_error_that_lasts() -> None:
    calls = []

    def before(kind: str, slots: list[int]) -> None:
        if kind == "decode":
            calls.append(slots)
            raise RuntimeError("CUDA error: device-side assert triggered")

    with served() as (llm, url, _):
        llm.runner.before = before
        answers = together(url, PROMPTS)
        assert {answer.code for answer in answers} == {"engine_dead"}
        assert len(calls) == 1  # nothing is tried again
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "restart the runtime" in health.json()["message"]
        assert post(url, "a newcomer").code == "engine_dead"
        figures = llm.manager.metrics.snapshot()
        assert (figures["in_flight"], figures["restarts"]) == (0, 0)


def leave(sock: socket.socket, how: str) -> None:
    """RST, FIN, or a half-close before it."""
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif how == "half":
        sock.shutdown(socket.SHUT_WR)
    sock.close()


def disconnects(streams: int, plain: int) -> None:
    draw = random.Random(7)
    with served(engine={"max_queue": streams + plain}) as (llm, url, baseline):
        kinds = [True] * streams + [False] * plain
        draw.shuffle(kinds)

        def client(stream: bool, wait_s: float, how: str) -> None:
            sock = open_post(url, {"prompt": "a client that leaves", "max_tokens": 2000, "stream": stream})
            time.sleep(wait_s)
            leave(sock, how)

        with ThreadPoolExecutor(32) as pool:
            for stream in kinds:
                pool.submit(client, stream, draw.uniform(0, 0.2), draw.choice(["reset", "close", "half"]))
        began = time.monotonic()
        baseline.rest()
        assert time.monotonic() - began < 1
        baseline.check()
        assert llm.manager.metrics.snapshot()["outcomes"]["cancelled"] > 0.8 * (streams + plain)


def test_f7_clients_leave_at_random() -> None:
    disconnects(streams=60, plain=30)


@pytest.mark.server
def test_f7_clients_leave_at_random_by_the_hundreds() -> None:
    disconnects(streams=500, plain=200)


def test_f8_clients_that_do_not_read() -> None:
    """Half of the clients stop reading: the others are as fast as without them, and the idle ones are cut off."""
    config = ServerConfig(port=0, drain_s=0.5, client_stall_s=0.5)
    wide = FakeRunner(num_slots=16, accept=(0, 2), sleep_s=0.001, max_context=1 << 20)
    with fake_llm(wide) as llm, serving(llm, config) as url:

        def normal() -> float:
            began = time.monotonic()
            answers = together(url, PROMPTS, 100)
            assert all(a.text == solo(llm, p, 100) for a, p in zip(answers, PROMPTS, strict=True))
            return time.monotonic() - began

        alone = min(normal() for _ in range(2))
        # each event is small: only a reader with the smallest of buffers is ever late
        body = {"prompt": "a client that does not read", "max_tokens": 500_000, "stream": True}
        idle = [open_post(url, body, receive_buffer=1024) for _ in range(8)]
        wait_for(lambda: llm.manager.status().running == 8)
        beside = min(normal() for _ in range(2))
        assert beside < 3 * alone + 0.5  # twice the rows, two cores, and Python's one lock
        for sock in idle:
            leave(sock, "reset")
        wait_for(lambda: not llm.runner.slots)


def test_f9_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        began = time.monotonic()
        with pytest.raises(InvalidConfig, match="in use"):
            bind(ServerConfig(port=taken.getsockname()[1]))
        assert time.monotonic() - began < 1


def stop_under_load(streams: int) -> None:
    threads = threading.active_count()
    with fake_llm(FakeRunner(num_slots=8, sleep_s=0.002), max_queue=64) as llm, contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(llm, ServerConfig(port=0, drain_s=0.3)))
        with ThreadPoolExecutor(streams) as pool:
            jobs = [pool.submit(post, url, f"{n}", 4000, True) for n in range(streams)]
            wait_for(lambda: llm.manager.metrics.snapshot()["in_flight"] == streams)
            server = running(url)
            for _ in range(3):  # stopping twice is stopping once
                server.should_exit = True
            answers = [job.result() for job in jobs]
        assert {answer.code for answer in answers} == {"shutting_down"}
        began = time.monotonic()
        stack.close()
        assert time.monotonic() - began < 10
        port = int(url.rpartition(":")[2])
        bind(ServerConfig(port=port)).close()
    wait_for(lambda: threading.active_count() <= threads)


def test_f11_stop_with_32_streams_open() -> None:
    stop_under_load(32)


@pytest.mark.server
def test_f13_start_and_stop_under_load_twenty_times() -> None:
    import psutil

    stop_under_load(8)
    fds = psutil.Process().num_fds()
    for _ in range(20):
        stop_under_load(8)
    assert psutil.Process().num_fds() <= fds + 2


def test_f15_a_clock_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock is asked by nobody who serves."""
    with served() as (llm, url, baseline):
        real = time.time
        for shift in (-86_400.0, 86_400.0):
            monkeypatch.setattr(time, "time", lambda shift=shift: real() + shift)
            answers = together(url, PROMPTS)
            assert [answer.text for answer in answers] == [solo(llm, prompt) for prompt in PROMPTS]
        monkeypatch.undo()
        baseline.check()


def test_f15_a_log_handler_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("No space left on device")

    monkeypatch.setattr(logging, "raiseExceptions", False)
    broken = Broken()
    with served() as (llm, url, baseline):
        logging.getLogger("medusa_serve").addHandler(broken)
        try:
            llm.runner.poison = ord("!")
            answers = together(url, [*PROMPTS[:7], "bad!"])
            assert answers[-1].code == "generation_failed"
            assert [answer.text for answer in answers[:7]] == [solo(llm, prompt) for prompt in PROMPTS[:7]]
            baseline.check()
        finally:
            logging.getLogger("medusa_serve").removeHandler(broken)


def test_a_delta_that_cannot_be_told_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong between engine and socket, nobody waits for ever."""
    with served() as (llm, url, baseline):
        put, bad = OpenSequence.put, set()

        def broken(self: OpenSequence, delta: Delta) -> None:
            bad.add(self.id) if not bad else None
            if self.id in bad and delta.is_last:
                raise TypeError("a bug")
            put(self, delta)

        monkeypatch.setattr(OpenSequence, "put", broken)
        answers = together(url, PROMPTS)
        monkeypatch.undo()
        whole = [answer for n, answer in enumerate(answers) if answer.text == solo(llm, PROMPTS[n])]
        assert len(whole) == 7
        assert {answer.code for answer in answers} == {None}  # an error without a code of its own
        baseline.check()
