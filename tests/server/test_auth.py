"""With a key everything but GET /health needs it; the wrong one is 401, never 500, and never says more."""

import asyncio
from typing import Any

import pytest

from medusa_serve.config import ServerConfig
from medusa_serve.server.app import create_app
from medusa_serve.server.auth import presented_key

from .standins import HandLLM, ask, error_of

KEY = "correct-Horse-7"
CONFIG = ServerConfig(api_key=KEY)
Headers = list[tuple[bytes, bytes]]

WRONG: list[Headers] = [
    [],
    [(b"authorization", b"")],
    [(b"authorization", b"Bearer")],
    [(b"authorization", b"Bearer ")],
    [(b"authorization", KEY.encode())],
    [(b"authorization", b"Basic " + KEY.encode())],
    [(b"authorization", b"Token " + KEY.encode())],
    [(b"authorization", b"Bearer " + KEY.lower().encode())],
    [(b"authorization", b"Bearer " + KEY[:-1].encode())],
    [(b"authorization", b"Bearer " + KEY.encode() + b"x")],
    [(b"authorization", b"Bearer " + KEY.encode() + b" x")],
    [(b"authorization", b"Bearer \xc3\xa9")],
    [(b"authorization", b"Bearer \xff\x00")],
    [(b"authorization", b"Bearer " + b"x" * 10_000)],
    [(b"authorization", b"Bearer " + KEY.encode())] * 2,
    [(b"authorization", b"Bearer wrong"), (b"x-api-key", KEY.encode())],
    [(b"x-api-key", b"")],
    [(b"x-api-key", b"wrong")],
    [(b"x-api-key", KEY.encode()), (b"x-api-key", b"wrong")],
    [(b"x-api-key", "\u00e9".encode("latin-1"))],
    [(b"host", b"localhost/health?")],
    [(b"host", b"x/health#")],
]
RIGHT: list[Headers] = [
    [(b"authorization", b"Bearer " + KEY.encode())],
    [(b"authorization", b"bearer  " + KEY.encode() + b" ")],
    [(b"x-api-key", KEY.encode())],
]


@pytest.mark.parametrize("headers", WRONG)
def test_wrong(headers: Headers) -> None:
    llm = HandLLM()
    reply, unknown = ask(
        llm,
        {"json": {"prompt": "a"}, "headers": headers},
        {"method": "GET", "url": "/nowhere", "headers": headers},
        config=CONFIG,
    )
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert error_of(reply) == error_of(unknown)
    assert error_of(reply)["code"] == "invalid_api_key"
    assert KEY not in reply.text
    assert llm.manager.calls == []


@pytest.mark.parametrize("headers", RIGHT)
def test_right(headers: Headers) -> None:
    llm = HandLLM()
    reply, unknown = ask(
        llm,
        {"json": {"prompt": "a"}, "headers": headers},
        {"method": "GET", "url": "/nowhere", "headers": headers},
        config=CONFIG,
    )
    assert (reply.status_code, unknown.status_code) == (200, 404)
    tenant = llm.manager.calls[0][2]
    assert tenant
    assert KEY not in tenant


def test_only_health_is_open() -> None:
    paths = (
        "/",
        "/docs",
        "/openapi.json",
        "/generate",
        "/health/",
        "/metrics",
        "/health/x",
        "//health",
        "/%68ealth/..",
    )
    gets = [{"method": method, "url": path} for path in paths for method in ("GET", "POST", "OPTIONS", "HEAD", "PUT")]
    assert {r.status_code for r in ask(HandLLM(), *gets, config=CONFIG)} == {401}
    (health,) = ask(HandLLM(), {"method": "GET", "url": "/health"}, config=CONFIG)
    assert health.status_code == 200
    assert {r.status_code for r in ask(HandLLM(), {"url": "/health"}, config=CONFIG)} == {401}


def test_without_a_key_nothing_is_asked() -> None:
    llm = HandLLM()
    (reply,) = ask(llm, {"json": {"prompt": "a"}, "headers": {"authorization": "Bearer whatever"}})
    assert reply.status_code == 200
    assert llm.manager.calls[0][2] == ""


def test_a_key_beyond_ascii() -> None:
    config = ServerConfig(api_key="schlüssel")
    headers = [(b"x-api-key", "schlüssel".encode())]
    (reply,) = ask(HandLLM(), {"json": {"prompt": "a"}, "headers": headers}, config=config)
    assert reply.status_code == 200


def test_refused_before_the_body_is_read() -> None:
    async def go() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)

        app = create_app(HandLLM(), CONFIG)
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "query_string": b""}
        await app(scope, receive, send)
        return sent

    assert asyncio.run(go())[0]["status"] == 401


def test_presented_key() -> None:
    assert presented_key([(b"Authorization", b"Bearer k")]) == b"k"
    assert presented_key([(b"X-API-Key", b" k ")]) == b"k"
    assert presented_key([(b"x-api-key", b"k"), (b"authorization", b"Basic k")]) is None
