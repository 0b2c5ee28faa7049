"""Through the Ingress to the replicas' ports and back, with Ray's handle stood in for: real sockets, no cluster."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from medusa_serve.config import EngineConfig
from medusa_serve.server.config import ServerConfig
from medusa_serve.server.guard.connection import Connection
from medusa_serve.types import Delta, EngineStatus
from tests.server.standins import HandLLM, HandManager, completion, error_of, events, hello

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:(ray|pydantic).*")]

Message = dict[str, Any]
STREAM = {"prompt": "a", "stream": True}


# ---- what stands for Ray ---------------------------------------------------------------------------------------------


class Call:
    """A streaming call as a handle's `remote` gives it."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items, self.cancelled = items, False

    async def __anext__(self) -> Any:
        return await anext(self._items)

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """The handle of the replicas: the n-th call asks the n-th of `replicas`, and the last one ever after. Each is a
    Replica, an address, or an exception to raise."""

    def __init__(self, *replicas: Any) -> None:
        self.replicas, self.permit, self.calls = replicas, self, list[Call]()
        self.ended = 0

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, node: str) -> Call:
        replica = self.replicas[min(len(self.calls), len(self.replicas) - 1)]

        async def items() -> AsyncIterator[Any]:
            if isinstance(replica, Exception):
                raise replica
            if isinstance(replica, str):
                yield replica, "permit"
            else:
                async for item in replica.permit(node):
                    yield item

        self.calls.append(Call(items()))
        return self.calls[-1]


@pytest.fixture
def replica() -> Iterator[Callable[..., Any]]:
    """Makes replicas that answer by a HandManager; they are stopped at the end."""
    from medusa_serve.cluster.replica import Replica

    made = []

    def make(manager: HandManager, server: ServerConfig | None = None) -> Any:
        made.append(Replica(EngineConfig(), server or ServerConfig(), lambda engine: HandLLM(manager)))  # type: ignore
        return made[-1]

    yield make
    for each in made:
        each.__del__()
        assert not each._thread.is_alive()


@pytest.fixture
def ingress(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The app of an Ingress to these replicas."""
    from ray import serve

    from medusa_serve.cluster.ingress import Ingress

    monkeypatch.setattr(serve, "get_replica_context", lambda: type("Context", (), {"app_name": "medusa"}))
    return lambda handle, config=None: Ingress(handle, config or ServerConfig()).__serve_build_asgi_app__()


@contextlib.asynccontextmanager
async def scripted(*writes: bytes, heard: list[bytes] | None = None) -> AsyncIterator[str]:
    """The address of a replica that answers each request with `writes`, and dies of it. heard: gets their heads"""

    running = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.add(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(len(json.dumps(STREAM)))
        if heard is not None:
            heard.append(head)
        for data in writes:
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"{host}:{port}"
        await asyncio.gather(*running)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STEP, DONE = b'data: {"text":"a"}\n\n', b'data: {"finish_reason":"stop"}\n\ndata: [DONE]\n\n'


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


# ---- a client in this process ----------------------------------------------------------------------------------------


async def shut(app: Any) -> None:
    """Let the Ingress close its connections."""
    kinds = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Message:
        return {"type": next(kinds)}

    async def send(_: Message) -> None: ...

    await app({"type": "lifespan"}, receive, send)


def told_by(app: Any, *requests: dict[str, Any]) -> list[httpx.Response]:
    """httpx requests (as keyword dicts), one after the other."""

    async def go() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            out = [await client.request(**({"method": "POST", "url": "/generate"} | each)) for each in requests]
        await shut(app)
        return out

    return asyncio.run(go())


async def by_hand(
    app: Any, left: Awaitable[Any] | None = None, told: list[Message] | None = None, **scope: Any
) -> tuple[int, bytes]:
    """(status, body) of one POST; the client leaves when `left` is over. There is one head and one end, or nothing.
    told: gets the messages"""
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    full = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": headers} | scope
    request = [{"type": "http.request", "body": json.dumps(STREAM).encode(), "more_body": False}]
    sent: list[Message] = [] if told is None else told

    async def receive() -> Message:
        if request:
            return request.pop()
        await (left or asyncio.Event().wait())
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(full, receive, send)
    await shut(app)
    if left is None:
        assert [message["type"] for message in sent].count("http.response.start") == 1
        assert [message.get("more_body", True) for message in sent].count(False) == 1
        assert sent[-1].get("more_body") is False
    return sent[0]["status"] if sent else 0, b"".join(message.get("body", b"") for message in sent)


async def until(true: Callable[[], Any], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


# ---- an answer -------------------------------------------------------------------------------------------------------


def test_answers_pass_as_the_replica_gives_them(replica: Any, ingress: Any) -> None:
    mine = replica(HandManager())
    stream, whole, missing = told_by(
        ingress(Handle(mine)),
        {"json": STREAM, "headers": {"X-Request-Id": "mine-1", "Connection": "x-hop", "X-Hop": "1"}},
        {"json": {"prompt": "a"}},
        {"method": "GET", "url": "/no/such?a=%2Fb"},
    )
    assert "".join(told["text"] for told in events(stream.text)) == "Hello!"
    assert whole.json()["text"] == "Hello!"
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
    assert stream.headers["x-request-id"] == "mine-1"
    for name in ("connection", "transfer-encoding", "keep-alive", "date", "server", "medusa-permit", "medusa-client"):
        assert name not in stream.headers


def test_a_request_arrives_as_the_client_wrote_it(ingress: Any) -> None:
    """But for what belongs to a connection, and with the names of ours that a client might forge."""
    heard: list[bytes] = []
    headers = [(b"host", b"localhost"), (b"connection", b"keep-alive, x-hop"), (b"x-hop", b"1"), (b"x-a", b"1")]
    headers += [
        (b"x-a", b"\xc3\xbc"),
        (b"medusa-client", b"6.6.6.6"),
        (b"te", b"trailers"),
        (b"expect", b"100-continue"),
    ]
    scope = {"raw_path": b"//e.org/a%2Fb", "path": "//e.org/a/b", "query_string": b"x=%zz", "headers": headers}

    async def go() -> None:
        async with scripted(HEAD, chunk(STEP + DONE), b"0\r\n\r\n", heard=heard) as address:
            assert await by_hand(ingress(Handle(address)), client=("9.8.7.6", 5), **scope) == (200, STEP + DONE)

    asyncio.run(go())
    [head] = heard
    line, *told = head.decode().removesuffix("\r\n\r\n").split("\r\n")
    assert line == "POST //e.org/a%2Fb?x=%zz HTTP/1.1"
    expected = ["Host: localhost", "medusa-permit: permit", "medusa-client: 9.8.7.6", "x-a: 1", "x-a: ü"]
    assert told == [*expected, f"Content-Length: {len(json.dumps(STREAM))}"]


def test_an_answers_headers_are_the_apps_alone(ingress: Any) -> None:
    inner = b"Connection: X-Inner\r\nX-Inner: 1\r\nKeep-Alive: timeout=5\r\nDate: now\r\nServer: x\r\nX-Mine: 1\r\n\r\n"
    told: list[Message] = []

    async def go() -> None:
        async with scripted(HEAD[:-2] + inner, chunk(DONE), b"0\r\n\r\n") as address:
            await by_hand(ingress(Handle(address)), told=told)

    asyncio.run(go())
    assert told[0]["headers"] == [(b"content-type", b"text/event-stream"), (b"x-mine", b"1")]


@pytest.mark.parametrize("path", ["@127.0.0.1:1/", "http://127.0.0.1:1/", "*", ":1/x"])
def test_a_path_is_a_path_whatever_it_says(ingress: Any, path: str) -> None:
    heard: list[bytes] = []

    async def go() -> None:
        async with scripted(HEAD, chunk(DONE), b"0\r\n\r\n", heard=heard) as address:
            await by_hand(ingress(Handle(address)), path=path, raw_path=path.encode())

    asyncio.run(go())
    assert heard[0].startswith(f"POST /{path} HTTP/1.1\r\n".encode())


def test_the_replicas_ask_for_the_key_and_look_at_the_host(replica: Any, ingress: Any) -> None:
    config = ServerConfig(api_key="k3y")
    app = ingress(Handle(replica(HandManager(), config)), config)
    keyed = {"json": {"prompt": "a"}, "headers": {"X-API-Key": "k3y"}}
    refused, wrong, right = told_by(app, {"json": {}}, {"json": {}, "headers": {"X-API-Key": "no"}}, keyed)
    assert (refused.status_code, wrong.status_code, right.status_code) == (401, 401, 200)
    for hosts in ([], [b"evil.example"], [b"localhost", b"evil.example"], [b""]):
        headers = [(b"x-api-key", b"k3y"), *((b"host", host) for host in hosts)]
        status, body = asyncio.run(by_hand(ingress(Handle(replica(HandManager(), config)), config), headers=headers))
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_host"), hosts


def test_wrong_keys_are_counted_by_the_clients_own_address(replica: Any, ingress: Any) -> None:
    config = ServerConfig(api_key="k3y", wrong_keys_per_minute=1)
    mine = replica(HandManager(), config)
    headers = [(b"host", b"localhost"), (b"x-api-key", b"no")]

    def status_for(client: str) -> int:
        return asyncio.run(by_hand(ingress(Handle(mine), config), headers=headers, client=(client, 1)))[0]

    assert [status_for(client) for client in ("9.9.9.9", "9.9.9.9", "8.8.8.8")] == [401, 429, 401]


def test_bodies_pass_up_to_the_limit(replica: Any, ingress: Any) -> None:
    manager = HandManager(lambda name, ids, params: [Delta("a" * 300_000, (1,), (0,), (1,)), *hello(name, ids, params)])
    mine = replica(manager)
    room = ServerConfig().max_body_bytes - len(json.dumps({"prompt": "a", "x": ""}))
    large, too_large, answer = told_by(
        ingress(Handle(mine)),
        {"content": json.dumps({"prompt": "a", "x": "y" * room}), "headers": {"Content-Type": "application/json"}},
        {
            "content": json.dumps({"prompt": "a", "x": "y" * (room + 1)}),
            "headers": {"Content-Type": "application/json"},
        },
        {"json": STREAM},
    )
    assert (large.status_code, error_of(large)["param"]) == (400, "x")
    assert too_large.status_code == 413
    assert len("".join(told["text"] for told in events(answer.text))) == 300_006


def test_connections_are_kept(replica: Any, ingress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, made = list[Any](), Connection.connection_made

    def count(self: Connection, transport: Any) -> None:
        opened.append(transport)
        made(self, transport)

    monkeypatch.setattr(Connection, "connection_made", count)
    app = ingress(Handle(replica(HandManager())))
    answers = told_by(app, *[{"json": STREAM}, {"json": {"prompt": "a"}}, {"method": "GET", "url": "/info"}] * 3)
    assert {each.status_code for each in answers} == {200}
    assert len(opened) == 1


# ---- permits ---------------------------------------------------------------------------------------------------------


def test_a_port_gives_nothing_without_a_permit(replica: Any) -> None:
    config = ServerConfig(api_key="k3y")
    mine = replica(HandManager(), config)

    async def go() -> None:
        call = mine.permit(mine._node)
        address, name = await anext(call)
        assert address.startswith("127.0.0.1:")
        ours, keyed = {"medusa-permit": name}, {"X-API-Key": "k3y"}
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            for headers in ({}, keyed, keyed | {"medusa-permit": "guess"}):
                for method, path in (("GET", "/"), ("GET", "/health"), ("POST", "/generate"), ("GET", "/docs")):
                    refusal = await client.request(method, path, headers=headers)
                    assert (refusal.status_code, error_of(refusal)["code"]) == (421, "misdirected_request")
            assert (await client.post("/generate", json={"prompt": "a"}, headers=ours)).status_code == 401
            assert (await client.post("/generate", json={"prompt": "a"}, headers=keyed | ours)).status_code == 421
        with pytest.raises(StopAsyncIteration):  # its one request is over
            await anext(call)

    asyncio.run(go())


def test_a_place_that_nobody_comes_with_is_taken_back(
    replica: Any, ingress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medusa_serve.cluster import permits

    monkeypatch.setattr(permits, "USE_S", 0.05)
    mine = replica(HandManager())

    async def go() -> tuple[int, bytes]:
        call = mine.permit(mine._node)
        address, name = await anext(call)
        with pytest.raises(StopAsyncIteration):
            await anext(call)
        late = Handle(address, mine)  # who comes too late is given another permit
        return await by_hand(ingress(late))

    status, body = asyncio.run(go())
    assert (status, body.count(b"finish_reason")) == (200, 1)


def test_other_machines_get_an_address_of_this_one(replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from medusa_serve.cluster import replica as module

    monkeypatch.setattr(module, "get_node_ip_address", lambda: "127.0.0.2")
    mine = replica(HandManager())

    async def status_for(node: str) -> tuple[str, int]:
        call = mine.permit(node)
        address, name = await anext(call)
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            headers = {"medusa-permit": name, "Host": "localhost"}
            return address.partition(":")[0], (await client.get("/health", headers=headers)).status_code

    assert asyncio.run(status_for("127.0.0.2")) == ("127.0.0.1", 200)
    assert mine._outside == ""  # nothing is open to others before one asks
    assert asyncio.run(status_for("127.0.0.3")) == ("127.0.0.2", 200)
    assert asyncio.run(status_for("127.0.0.4")) == ("127.0.0.2", 200)


def test_a_client_that_leaves_cancels_its_sequence_and_gives_its_permit_back(replica: Any, ingress: Any) -> None:
    manager = HandManager(None)
    mine = replica(manager)

    async def go() -> None:
        left, handle = asyncio.Event(), Handle(mine)
        asking = asyncio.ensure_future(by_hand(ingress(handle), left.wait()))
        await until(lambda: manager.calls)
        manager.push("seq-0", Delta("a", (1,), (0,), (1,)))
        left.set()
        await asking
        await until(lambda: manager.cancelled == ["seq-0"])
        with pytest.raises(StopAsyncIteration):
            await anext(handle.calls[0])

    asyncio.run(go())


def test_a_client_that_leaves_before_it_has_a_place_wants_none(ingress: Any) -> None:
    class Full:
        async def permit(self, node: str) -> AsyncIterator[Any]:
            await asyncio.Event().wait()
            yield node

    async def go() -> None:
        handle = Handle(Full())
        await by_hand(ingress(handle), asyncio.sleep(0.05))
        assert [call.cancelled for call in handle.calls] == [True]

    asyncio.run(go())


# ---- the last word ---------------------------------------------------------------------------------------------------


def died() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def run_scripts(ingress: Any, *scripts: tuple[bytes, ...]) -> tuple[int, bytes, int]:
    """(status, body, calls) of a stream whose n-th replica plays the n-th script."""

    async def go() -> tuple[int, bytes, int]:
        async with contextlib.AsyncExitStack() as stack:
            handle = Handle(*[await stack.enter_async_context(scripted(*script)) for script in scripts])
            return (*await by_hand(ingress(handle)), len(handle.calls))

    return asyncio.run(go())


WHOLE = (HEAD, chunk(STEP), chunk(DONE), b"0\r\n\r\n")


@pytest.mark.parametrize("writes", [(), (HEAD,), (HEAD, chunk(STEP)[:-9])], ids=["nothing", "head", "part"])
def test_a_death_before_the_first_event_is_another_replicas_turn(ingress: Any, writes: tuple[bytes, ...]) -> None:
    assert run_scripts(ingress, writes, WHOLE) == (200, STEP + DONE, 2)


def test_a_death_in_an_answer_that_is_no_stream_is_another_replicas_turn(ingress: Any) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n"
    assert run_scripts(ingress, (head, b'{"a":'), (head, b'{"a": 12}')) == (200, b'{"a": 12}', 2)


@pytest.mark.parametrize("more", [b"", chunk(STEP)[:-9]], ids=["between events", "within one"])
def test_a_death_in_a_stream_is_its_one_terminal_event(ingress: Any, more: bytes) -> None:
    status, body, calls = run_scripts(ingress, (HEAD, chunk(STEP), more), WHOLE)
    told = body.decode().split("\n\n")[:-1]
    assert (status, calls, len(told), told[0], told[-1]) == (200, 1, 3, STEP.decode().strip(), "data: [DONE]")
    assert json.loads(told[1].removeprefix("data: "))["error"]["code"] == "generation_failed"


def test_a_death_behind_the_end_changes_nothing(ingress: Any) -> None:
    assert run_scripts(ingress, WHOLE[:-1], WHOLE) == (200, STEP + DONE, 1)


def test_events_that_come_in_parts_or_together_are_passed_on_whole(ingress: Any) -> None:
    parts = chunk(STEP + STEP), chunk(STEP)[:9], chunk(STEP)[9:], chunk(DONE) + b"0\r\n\r\n"
    assert run_scripts(ingress, (HEAD, *parts)) == (200, 3 * STEP + DONE, 1)


def test_full_replicas_are_429_and_dead_ones_503(ingress: Any) -> None:
    from ray.serve.exceptions import BackPressureError

    full = BackPressureError(num_queued_requests=9, max_queued_requests=9)
    status, body = asyncio.run(by_hand(ingress(Handle(full))))
    assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full")
    for lost in (died(), "127.0.0.1:1"):  # by Ray's word, or nobody listens
        handle = Handle(lost)
        status, body = asyncio.run(by_hand(ingress(handle)))
        assert (status, json.loads(body)["error"]["type"], len(handle.calls)) == (503, "service_unavailable_error", 3)


# ---- a replica -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["failed", "stalled", "closed"])
def test_an_engine_that_does_not_turn_is_an_unhealthy_replica(replica: Any, state: str) -> None:
    manager = HandManager()
    mine = replica(manager)
    mine.check_health()
    manager.state = EngineStatus(state, 0, 0, 0.0, "A step has been running for 99 s.")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="running for 99 s"):
        mine.check_health()


def test_a_replica_whose_server_is_gone_is_unhealthy(replica: Any) -> None:
    mine = replica(HandManager())
    mine._server.should_exit = True
    mine._thread.join(10)
    with pytest.raises(RuntimeError, match="HTTP server is gone"):
        mine.check_health()


def test_a_replica_that_stops_lets_answers_end(replica: Any, ingress: Any) -> None:
    manager = HandManager(None)
    mine = replica(manager)

    async def go() -> tuple[int, bytes]:
        asking = asyncio.ensure_future(by_hand(ingress(Handle(mine))))
        await until(lambda: manager.calls)
        stopping = asyncio.ensure_future(asyncio.to_thread(mine.__del__))
        await asyncio.sleep(0.1)
        manager.push("seq-0", Delta("a", (1,), (0,), (1,), completion=completion("seq-0", "a")))
        answer = await asking
        await stopping
        return answer

    status, body = asyncio.run(go())
    assert (status, body.count(b"[DONE]")) == (200, 1)
    assert mine._llm.closed
