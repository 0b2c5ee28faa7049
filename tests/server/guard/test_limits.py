"""Time and size: what comes too slowly, stays too long or asks for too much is ended, and nobody else notices."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from typing import Any

import pytest

from medusa_serve.errors import InvalidConfig
from medusa_serve.server.api.info import limits_of
from medusa_serve.server.config import ServerConfig
from medusa_serve.server.guard.access_log import tame
from medusa_serve.types import Delta, EngineStatus

from ..standins import HandLLM, HandManager, ask, completion, error_of, events, open_post, serving, unchunk, wait_for

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 5)


def closed_after(sock: socket.socket, began: float) -> float:
    """Seconds until the server closed the connection, and nothing came."""
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(100) == b""
    return time.monotonic() - began


HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", HEAD])
def test_a_head_that_does_not_come(sent: bytes) -> None:
    with serving(HandLLM(), ServerConfig(port=0, header_s=0.2)) as url, connect(url) as sock:
        began = time.monotonic()
        sock.sendall(sent)
        assert 0.1 < closed_after(sock, began) < 2
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_head_of_which_a_byte_comes_now_and_then() -> None:
    with serving(HandLLM(), ServerConfig(port=0, header_s=0.3)) as url, connect(url) as sock:
        began = time.monotonic()
        with contextlib.suppress(OSError):  # closed meanwhile
            for byte in HEAD * 10:
                sock.sendall(bytes([byte]))
                time.sleep(0.02)
        assert time.monotonic() - began < 2


def test_a_second_head_that_does_not_come() -> None:
    """The first request of the connection is answered; the keep-alive time ends an idle one."""
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for sent in (get, get + b"GET /hea"):
        with serving(HandLLM(), ServerConfig(port=0, header_s=0.2, keep_alive_s=0.2)) as url, connect(url) as sock:
            began = time.monotonic()
            sock.sendall(sent)
            raw = b""
            while not raw.endswith(b"}"):
                raw += sock.recv(4096)
            assert b" 200 " in raw
            assert closed_after(sock, began) < 2


def test_a_long_answer_is_no_late_head() -> None:
    manager = HandManager(None)
    with serving(HandLLM(manager), ServerConfig(port=0, header_s=0.1, keep_alive_s=0.1)) as url:
        sock = open_post(url, {"prompt": "a"})
        wait_for(lambda: manager.sinks)
        time.sleep(0.4)
        manager.push("seq-0", Delta("a", (1,), (0,), completion=completion("seq-0", "Hello!")))
        assert b" 200 " in sock.recv(65536)
        sock.close()


def test_a_body_that_comes_too_slowly_is_408() -> None:
    with serving(HandLLM(), ServerConfig(port=0, body_s=0.2)) as url, connect(url) as sock:
        sock.sendall(HEAD + b'\r\n{"prompt": ')
        raw = b""
        while piece := sock.recv(4096):
            raw += piece
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b" 408 " in head.partition(b"\r\n")[0]
    assert b"x-should-retry: false" in head.lower()
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_many_headers_are_431() -> None:
    few, many = ({f"x-{n}": "1" for n in range(count)} for count in (80, 120))
    replies = ask(HandLLM(), *({"json": {"prompt": "a"}, "headers": headers} for headers in (few, many)))
    assert [r.status_code for r in replies] == [200, 431]
    assert error_of(replies[1])["code"] == "headers_too_large"


def test_a_connection_too_many_is_answered_503() -> None:
    with serving(HandLLM(), ServerConfig(port=0, max_connections=3)) as url:
        held = [connect(url) for _ in range(3)]
        time.sleep(0.05)
        reply = httpx.get(f"{url}/health")
        assert (reply.status_code, error_of(reply)["code"]) == (503, "too_many_connections")
        assert reply.headers["retry-after"] == "1"
        for sock in held:
            sock.close()
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)


def test_a_client_that_takes_nothing_is_cut_off() -> None:
    manager = HandManager(None)
    with serving(HandLLM(manager), ServerConfig(port=0, client_stall_s=0.3)) as url:
        sock = open_post(url, {"prompt": "a", "stream": True}, receive_buffer=4096)
        other = open_post(url, {"prompt": "b", "stream": True})
        wait_for(lambda: len(manager.sinks) == 2)
        for _ in range(20):  # merged, each costs what is there already
            manager.push("seq-0", Delta("x" * 500_000, (1,), (0,)))
        wait_for(lambda: manager.cancelled == ["seq-0"], 3)
        manager.push("seq-1", Delta("b", (1,), (0,), completion=completion("seq-1", "Hello!")))
        raw = b""
        while b"[DONE]" not in raw:
            raw += other.recv(65536)
        sock.close()
        other.close()


# ---- deadlines -----------------------------------------------------------------------------------------------------

TIMES = {"queue_s": 0.2, "first_token_s": 0.6, "total_s": 1.0}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("state", "status", "code"),
    [("waiting", 503, "queue_timeout"), ("prefill", 504, "generation_timeout"), ("decode", 504, "generation_timeout")],
)
def test_what_takes_too_long(stream: bool, state: str, status: int, code: str) -> None:
    manager = HandManager(None)
    with serving(HandLLM(manager), ServerConfig(port=0, **TIMES)) as url:
        replies: list[httpx.Response] = []

        def client() -> None:
            replies.append(httpx.post(f"{url}/generate", json={"prompt": "a", "stream": stream}, timeout=10))

        if state == "waiting":
            manager.waiting.add("seq-0")
        thread = threading.Thread(target=client)
        began = time.monotonic()
        thread.start()
        wait_for(lambda: manager.sinks)
        if state == "decode":
            manager.push("seq-0", Delta("a", (1,), (0,)))
        thread.join()
        took = time.monotonic() - began
    (reply,) = replies
    least = {"waiting": 0.2, "prefill": 0.6, "decode": 1.0}[state]
    assert least < took < least + 1
    if stream:
        assert reply.status_code == 200
        assert events(reply.text)[-1]["error"]["code"] == code
    else:
        assert (reply.status_code, error_of(reply)["code"]) == (status, code)
        assert ("retry-after" in reply.headers) == (status == 503)
        assert ("x-should-retry" in reply.headers) == (status == 504)
    assert (manager.cancelled, manager.outcomes) == (["seq-0"], ["timeout"])


@pytest.mark.parametrize(("state", "code"), [("stalled", "engine_stalled"), ("failed", "engine_dead")])
def test_an_engine_that_says_nothing_more(state: str, code: str) -> None:
    """It hangs, or its thread is gone without a word: each open request gets its last word from here."""
    manager = HandManager(None)
    with serving(HandLLM(manager)) as url:
        socks = [open_post(url, {"prompt": "a", "stream": n == 0}) for n in range(2)]
        wait_for(lambda: len(manager.sinks) == 2)
        manager.state = EngineStatus(state, 2, 0, 0.0, "A step has been running for 61 s.")  # type: ignore[arg-type]
        began, raw = time.monotonic(), [b"", b""]
        for n, sock in enumerate(socks):
            while not raw[n].endswith((b"\r\n0\r\n\r\n", b"}}")):
                raw[n] += sock.recv(65536)
            sock.close()
        assert time.monotonic() - began < 2
        assert httpx.get(f"{url}/health").json()["status"] == state
    assert events(unchunk(raw[0].partition(b"\r\n\r\n")[2]).decode())[-1]["error"]["code"] == code
    assert b" 503 " in raw[1].partition(b"\r\n")[0]
    assert code.encode() in raw[1]


def test_a_silent_stream_says_something_now_and_then() -> None:
    manager = HandManager(None)
    config = ServerConfig(port=0, heartbeat_s=0.1)
    with serving(HandLLM(manager), config) as url:
        with httpx.stream("POST", f"{url}/generate", json={"prompt": "a", "stream": True}) as response:
            pieces = response.iter_text()
            assert next(pieces) == next(pieces) == ": waiting\n\n"
            manager.push("seq-0", Delta("a", (1,), (0,)))
            while not (text := next(pieces)).startswith("data: "):
                assert text == ": waiting\n\n"
            manager.push("seq-0", Delta("b", (1,), (0,), completion=completion("seq-0", "Hello!")))
            rest = "".join(pieces)
        assert rest.replace(": waiting\n\n", "").endswith("data: [DONE]\n\n")
        plain = threading.Thread(target=lambda: time.sleep(0.3) or manager.push("seq-1", last))
        last = Delta("b", (1,), (0,), completion=completion("seq-1", "Hello!"))
        plain.start()
        assert (
            httpx.post(f"{url}/generate", json={"prompt": "a"}).json()["text"] == "Hello!"
        )  # no comment in a JSON body
        plain.join()


# ---- guests --------------------------------------------------------------------------------------------------------

OWNER, GUEST, OTHER = "owner-key", "guest-key", "other-key"


def keyed(key: str, **fields: Any) -> dict[str, Any]:
    return {"json": {"prompt": "a"} | fields, "headers": {"x-api-key": key}}


def statuses(config: ServerConfig, *requests: dict[str, Any]) -> list[int]:
    return [r.status_code for r in ask(HandLLM(), *requests, config=config)]


def test_requests_and_tokens_per_minute_of_a_guest() -> None:
    keys = {"api_key": OWNER, "guest_keys": (GUEST, OTHER)}
    config = ServerConfig(**keys, guest_requests_per_minute=3)
    asked = [*[keyed(GUEST)] * 4, keyed(OTHER), *[keyed(OWNER)] * 5]
    assert statuses(config, *asked) == [200] * 3 + [429] + [200] * 6
    config = ServerConfig(**keys, guest_tokens_per_minute=10)  # an answer has 6
    assert statuses(config, *[keyed(GUEST)] * 4, keyed(OTHER), *[keyed(OWNER)] * 3) == [200] * 2 + [429] * 2 + [200] * 4
    config = ServerConfig(**keys, guests_requests_per_minute=3)
    assert statuses(config, keyed(GUEST), keyed(OTHER), keyed(GUEST), keyed(OTHER), keyed(OWNER)) == [200] * 3 + [
        429,
        200,
    ]
    refused = ask(HandLLM(), *[keyed(GUEST)] * 4, config=ServerConfig(**keys, guest_requests_per_minute=3))[3]
    assert (error_of(refused)["type"], error_of(refused)["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 55 <= int(refused.headers["retry-after"]) <= 60


def test_requests_of_a_guest_at_once() -> None:
    manager = HandManager(None)
    config = ServerConfig(port=0, api_key=OWNER, guest_keys=(GUEST,), guest_concurrent=2)
    with serving(HandLLM(manager), config) as url:

        def post(key: str) -> httpx.Response:
            return httpx.post(f"{url}/generate", json={"prompt": "a"}, headers={"x-api-key": key}, timeout=10)

        threads = [threading.Thread(target=post, args=(GUEST,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(manager.sinks) == 2)
        assert post(GUEST).status_code == 429
        for n in range(2):
            manager.push(f"seq-{n}", Delta("a", (1,), (0,), completion=completion(f"seq-{n}", "Hello!")))
        for thread in threads:
            thread.join()
        manager.script = HandManager().script
        assert post(GUEST).status_code == post(OWNER).status_code == 200


# ---- what is told --------------------------------------------------------------------------------------------------


def test_the_access_log_holds_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medusa_serve")
    config = ServerConfig(api_key=OWNER, access_log=True)
    secret = {"x-api-key": OWNER, "cookie": "c00kie"}
    asked = {"url": "/generate?api_key=s3cret", "json": {"prompt": "pr0mpt"}, "headers": secret}
    ask(HandLLM(), asked, {"url": "/generate", "json": {}}, {"method": "GET", "url": "/a%0Ab"}, config=config)
    lines = [record.message for record in caplog.records if record.name == "medusa_serve.access"]
    assert [line.split(" ")[:3] for line in lines] == [
        ["POST", "/generate", "200"],
        ["POST", "/generate", "401"],
        ["GET", "/a?b", "401"],
    ]
    assert not any(word in " ".join(lines) for word in (OWNER, "s3cret", "pr0mpt", "c00kie", "Hello"))
    caplog.clear()
    ask(HandLLM(), {"json": {"prompt": "a"}})
    assert not [record for record in caplog.records if record.name == "medusa_serve.access"]
    assert len(tame("é" * 1000)) == 200


def test_limits_are_plain_data_without_secrets() -> None:
    config = ServerConfig(api_key=OWNER, guest_keys=(GUEST,))
    told = limits_of(config, HandLLM())
    assert json.loads(json.dumps(told)) == told
    assert (told["max_body_bytes"], told["queue_s"], told["total_s"], told["guest_concurrent"]) == (1 << 20, 60, 300, 4)
    assert (told["max_connections"], told["max_headers"], told["max_header_bytes"]) == (256, 100, 65536)
    assert (told["heartbeat_s"], told["first_token_s"], told["client_stall_s"], told["body_s"]) == (15, 120, 30, 30)
    assert (told["drain_s"], told["keep_alive_s"], told["wrong_keys_per_minute"]) == (10, 5, 10)
    assert (told["guest_requests_per_minute"], told["guest_tokens_per_minute"]) == (60, 20_000)
    assert (told["max_context"], told["max_prompt_chars"], told["max_messages"]) == (256, 2048, 128)
    assert (told["max_stops"], told["max_stop_chars"], told["max_queue"], told["stall_s"]) == (4, 64, 64, 60)
    assert not any(key in str(told) for key in (OWNER, GUEST))


@pytest.mark.parametrize(
    ("field", "value"),
    [("queue_s", 0), ("total_s", float("nan")), ("body_s", True), ("max_headers", 0), ("guest_keys", ["a"])]
    + [("guest_keys", ("",)), ("allowed_hosts", "x"), ("access_log", 1), ("max_connections", "5"), ("drain_s", -1)],
)
def test_nonsense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidConfig) as caught:
        ServerConfig(**{field: value})
    assert caught.value.param == field


def test_no_cors() -> None:
    evil = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    preflight, simple = ask(
        HandLLM(),
        {"method": "OPTIONS", "url": "/generate", "headers": evil},
        {"json": {"prompt": "a"}, "headers": evil},
    )
    assert (preflight.status_code, simple.status_code) == (405, 200)
    assert not [name for reply in (preflight, simple) for name in reply.headers if name.startswith("access-control")]


def test_a_watch_ends_with_the_last_request() -> None:
    from medusa_serve.server.router import DeltaRouter, OpenSequences
    from medusa_serve.server.timeouts import Watch
    from medusa_serve.types import SamplingParams

    async def go() -> list[str]:
        router = DeltaRouter(Watch(ServerConfig()))
        sequence = router.submit(HandManager(None), [1], SamplingParams(), key="", sequences=OpenSequences())
        during = [task.get_name() for task in asyncio.all_tasks()]
        sequence.close()
        await asyncio.sleep(0.3)
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "medusa-watch"]
        return during

    assert "medusa-watch" in asyncio.run(go())
