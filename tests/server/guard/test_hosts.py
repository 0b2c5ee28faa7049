"""Only this server's own names are answered, whatever a Host header holds."""

import pytest

from medusa_serve.errors import InvalidConfig
from medusa_serve.server.config import ServerConfig
from medusa_serve.server.guard.hosts import Hosts, name_of

from ..standins import HandLLM, ask, error_of, running, serving

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

HEALTH = {"method": "GET", "url": "/health"}
BAD = (
    *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", "x", ""),
    *("localhost/v1/models?", "localhost/health#", "evil@localhost", "localhost:80:80", "localhost:port", "a b"),
    *("local\u00e9", "[::1", "*", "*.localhost"),
)
GOOD = ("localhost", "LocalHost:8000", "127.0.0.1", "127.0.0.1:1", "[::1]:8000", "localhost.")


def test_names_of_this_machine_alone() -> None:
    replies = ask(HandLLM(), *(HEALTH | {"headers": [(b"host", host.encode())]} for host in (*GOOD, *BAD)))
    assert [r.status_code for r in replies] == [200] * len(GOOD) + [400] * len(BAD)
    for reply in replies[len(GOOD) :]:
        assert error_of(reply)["code"] == "invalid_host"
        assert "evil" not in reply.text


def test_two_host_headers_or_none() -> None:
    two = [(b"host", b"localhost"), (b"host", b"localhost")]
    assert [r.status_code for r in ask(HandLLM(), HEALTH | {"headers": two})] == [400]


def test_the_host_is_looked_at_before_the_key() -> None:
    config = ServerConfig(api_key="k")
    headers = {"host": "evil.example", "x-api-key": "k"}
    assert ask(HandLLM(), {"json": {"prompt": "a"}, "headers": headers}, config=config)[0].status_code == 400


def test_a_name_learned_while_the_server_runs() -> None:
    name = "abc.ngrok-free.app"
    with serving(HandLLM()) as url:

        def get(path: str, host: str) -> int:
            return httpx.get(url + path, headers={"host": host}).status_code

        assert get("/health", name) == 400
        running(url).allow_host(f"https://{name}/")
        running(url).allow_host("*.googleusercontent.com")
        learned = (name, f"{name}:443", "x-8000-colab.googleusercontent.com")
        assert [get("/health", host) for host in learned] == [200] * 3
        assert [get("/health", host) for host in ("x.ngrok-free.app", "googleusercontent.com")] == [400] * 2
        assert [get("/docs", host) for host in ("localhost", name)] == [200, 404]
        with pytest.raises(InvalidConfig):
            running(url).allow_host("a b")


def test_another_host_than_loopback_answers_to_addresses_and_its_name() -> None:
    hosts = Hosts("0.0.0.0", ("llm.example",))
    assert all(name in hosts for name in ("192.168.1.7", "::1", "localhost", "llm.example"))
    assert "evil.example" not in hosts
    assert "box.lan" in Hosts("box.lan")
    assert "192.168.1.7" not in Hosts("127.0.0.1")
    for bad in ("", "a b", "http://", "*", "*."):
        with pytest.raises(InvalidConfig):
            Hosts("127.0.0.1", (bad,))


def test_name_of() -> None:
    assert name_of(b"Host:80") == "host"
    assert name_of(b"[::1]:80") == "::1"
    assert name_of(b"a\x00b") is None
