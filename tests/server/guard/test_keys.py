"""With a key everything but GET /health needs it; the wrong one is 401, never 500, and never says more."""

import asyncio
from typing import Any

import pytest

from medusa_serve.errors import InvalidConfig
from medusa_serve.server.app import create_app
from medusa_serve.server.config import ServerConfig
from medusa_serve.server.guard.keys import OPEN, Keys, presented_key

from ..standins import HandLLM, ask, error_of, running, serving

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

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


def test_only_health_and_the_page_are_open() -> None:
    paths = (
        "/docs",
        "/openapi.json",
        "/generate",
        "/health/",
        "/metrics",
        "/health/x",
        "/health//",
        "/%68ealth/x",
    )
    gets = [{"method": method, "url": path} for path in paths for method in ("GET", "POST", "OPTIONS", "HEAD", "PUT")]
    assert {r.status_code for r in ask(HandLLM(), *gets, config=CONFIG)} == {401}
    health, page = ask(HandLLM(), *({"method": "GET", "url": url} for url in ("/health", "/")), config=CONFIG)
    assert health.status_code == 200
    assert page.status_code in (200, 404, 405)  # not the key's business
    posts = [{"url": url} for url in ("/health", "/")]
    assert {r.status_code for r in ask(HandLLM(), *posts, config=CONFIG)} == {401}


def test_every_route_but_the_open_ones_needs_the_key() -> None:
    app = create_app(HandLLM(), CONFIG)
    asked = [(method, path) for path, methods in app.openapi()["paths"].items() for method in methods]
    assert ("post", "/generate") in asked
    replies = ask(HandLLM(), *({"method": method.upper(), "url": path} for method, path in asked), config=CONFIG)
    for (method, path), reply in zip(asked, replies, strict=True):
        assert (reply.status_code == 401) == ((method.upper(), path) not in OPEN), (method, path)


def test_a_key_asked_for_while_the_server_runs() -> None:
    """As when a tunnel opens."""
    llm = HandLLM()
    with serving(llm) as url:
        server = running(url)
        assert httpx.post(f"{url}/generate", json={"prompt": "a"}).status_code == 200
        assert "security" not in httpx.get(f"{url}/openapi.json").json()["paths"]["/generate"]["post"]
        key = server.require_key()
        assert len(key) >= 40
        assert server.require_key() == server.require_key(key) == key
        with pytest.raises(InvalidConfig, match="another key"):
            server.require_key("mine")
        assert httpx.post(f"{url}/generate", json={"prompt": "a"}).status_code == 401
        headers = {"X-API-Key": key}
        assert httpx.post(f"{url}/generate", json={"prompt": "a"}, headers=headers).status_code == 200
        told = httpx.get(f"{url}/openapi.json", headers=headers).json()
        assert told["paths"]["/generate"]["post"]["security"] == [{"Bearer": []}, {"X-API-Key": []}]
        assert "security" not in told["paths"]["/health"]["get"]
        assert sorted(told["components"]["securitySchemes"]) == ["Bearer", "X-API-Key"]
        guest = server.add_guest()
        assert httpx.post(f"{url}/generate", json={"prompt": "a"}, headers={"X-API-Key": guest}).status_code == 200
        assert len({tenant for _, _, tenant in llm.manager.calls[1:]}) == 2
        with pytest.raises(InvalidConfig, match="owner"):
            server.add_guest(key)


def test_a_key_asked_for_in_vain_is_asked_for_no_more() -> None:
    keys = Keys(None)
    keys.require()
    keys.release()
    assert (keys.required, keys.owner) == (False, None)
    guest = keys.add_guest()
    keys.release()  # the guests' limits hold only where all need a key
    assert keys.required
    assert keys.tenant(guest.encode()).guest


def test_wrong_keys_are_counted_by_address() -> None:
    """The address is what the tunnel's agent appended last; what a client wrote before it counts for nothing."""

    def tries(count: int, address: str, key: str = "wrong") -> list[dict[str, Any]]:
        headers = [{"x-api-key": key, "x-forwarded-for": f"10.0.0.{n}, {address}"} for n in range(count)]
        return [{"json": {"prompt": "a"}, "headers": each} for each in headers]

    config = ServerConfig(api_key=KEY, wrong_keys_per_minute=10)
    replies = ask(HandLLM(), *tries(12, "1.2.3.4"), *tries(1, "5.6.7.8", KEY), *tries(1, "1.2.3.4", KEY), config=config)
    assert [r.status_code for r in replies] == [401] * 10 + [429] * 2 + [200, 429]
    assert error_of(replies[10])["code"] == "too_many_wrong_keys"
    assert 1 <= int(replies[10].headers["retry-after"]) <= 60
    missing = [{"json": {"prompt": "a"}}] * 15
    assert {r.status_code for r in ask(HandLLM(), *missing, config=config)} == {401}


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
        scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b""}
        scope |= {"headers": [(b"host", b"localhost")]}
        await app(scope, receive, send)
        return sent

    assert asyncio.run(go())[0]["status"] == 401


def test_presented_key() -> None:
    assert presented_key([(b"Authorization", b"Bearer k")]) == b"k"
    assert presented_key([(b"X-API-Key", b" k ")]) == b"k"
    assert presented_key([(b"x-api-key", b"k"), (b"authorization", b"Basic k")]) is None
