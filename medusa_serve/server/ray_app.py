"""Replicas: the same app, each with a model of its own, behind one address. Ray Serve runs them (extra `ray`).

client ─► HAProxy (or Ray's own proxy) ─► Door (no model) ─► one of the Replicas: create_app over its own LLM

Ray starts the replicas, routes to the least busy, scales them, replaces dead ones and drains old ones in an update.
The Door adds what only somebody outside a replica can: an answer whose replica dies gets its one terminal event, or is
asked of another replica where nothing of it was sent yet. Limits (slots, max_queue) are those of each replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.types import Message, Receive, Scope, Send

from ..config import EngineConfig
from ..errors import GenerationFailed, InvalidConfig, MedusaServeError, QueueFull, Unavailable
from .app import create_app
from .body import BodyLimit
from .config import ReplicasConfig, ServerConfig
from .failures import LastResort, reply_to
from .loading import ServedLLM
from .streaming import DONE, event, unless_gone

log = logging.getLogger(__name__)

Load = Callable[[EngineConfig], ServedLLM]
REPLICA, DOOR = "Replica", "Door"  # as `serve status` names them
SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
DEFAULT_SLOTS = 64  # where the replica chooses them from its memory
WARM_S = 90.0
TRIES = 3  # replicas that are asked for one answer, while nothing of it was sent
MESSAGE_S = 0.0005  # between two messages of a replica, about twice what one costs a Door: with many streams each
# waits longer, and takes more tokens in one message; Ray would queue without bounds what a Door cannot keep up with


# ---- the model's side ------------------------------------------------------------------------------------------------


class Replica:
    """One model and its app. Ray asks `check_health`, and replaces a replica that raises there."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, load: Load | None = None) -> None:
        if load is None:
            from ..llm import LLM

            load = LLM
        self._llm = load(engine)
        self._llm.manager.wait_until_rested(WARM_S)  # a replica that is asked has its passes captured
        self._app = create_app(self._llm, server)
        self._streams = 0  # answers that have begun

    def check_health(self) -> None:
        status = self._llm.manager.status()
        if status.state in ("failed", "stalled", "closed"):
            raise RuntimeError(status.message or f"The engine is {status.state}.")

    def facts(self) -> dict[str, Any]:
        llm: Any = self._llm
        notes = list(getattr(llm, "notes", []))
        chats = llm.codec.has_chat_template
        return {"facts": llm.describe(), "notes": notes, "has_chat_template": chats, "pid": os.getpid()}

    async def relay(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """Run the app on one request and yield its ASGI messages. Closing the generator is the client's leaving."""
        request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        box: asyncio.Queue[Message | None] = asyncio.Queue(1)  # full: the app waits, and merges what comes meanwhile
        gone = asyncio.Event()

        async def receive() -> Message:
            if request:
                return request.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def answer() -> None:
            await self._app({**scope, "state": {}, "extensions": {}}, receive, box.put)  # LastResort: it never raises
            await box.put(None)

        task, started = asyncio.ensure_future(answer()), False
        try:
            while (message := await box.get()) is not None:
                self._streams += not started
                started = True
                yield message
                if _is_last(message):
                    return
                await asyncio.sleep(MESSAGE_S * (self._streams - 1))
        finally:
            self._streams -= started
            gone.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def __del__(self) -> None:
        if hasattr(self, "_llm"):
            self._llm.close()


# ---- the client's side -----------------------------------------------------------------------------------------------


class Door:
    """Passes requests on to replicas, answers /health for all of them, and has the last word where one dies."""

    def __init__(self, replicas: Any, server: ServerConfig) -> None:
        self._replicas, self._config = replicas, server
        self._app_name = serve.get_replica_context().app_name

    def __serve_build_asgi_app__(self) -> Any:
        return LastResort(BodyLimit(self._request, self._config))

    async def facts(self) -> dict[str, Any]:
        """What one replica says of its model."""
        told: dict[str, Any] = await self._replicas.facts.remote()
        return told

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        request = await receive()  # whole: BodyLimit has read it
        asked = {name: scope[name] for name in SCOPE if name in scope}
        asked["client"], asked["server"] = scope.get("client"), scope.get("server")
        if scope["path"] == "/health" and scope["method"] == "GET":
            return await self._health(asked, scope, receive, send)
        with contextlib.suppress(OSError):  # newer ASGI servers: the client has left
            await unless_gone(receive, self._relayed(asked, request.get("body", b""), send))
        return None

    async def _relayed(self, scope: dict[str, Any], body: bytes, send: Send) -> None:
        for attempt in range(1, TRIES + 1):
            answer = Answer(send)
            try:
                await answer.pass_on(self._replicas.options(stream=True).relay.remote(scope, body))
                return
            except OSError:
                raise
            except BackPressureError:
                return await answer.end(QueueFull("All replicas are full; try again later."))
            except (RayError, RayServeException) as error:
                log.warning("A replica failed at a request: %s.", type(error).__name__)
                if answer.ended:
                    return
                if answer.started or attempt == TRIES:
                    return await answer.end(_lost(answer.started))

    async def _health(self, asked: dict[str, Any], scope: Scope, receive: Receive, send: Send) -> None:
        """A running replica's own word, and how many there are; 503 where none runs."""
        running, wanted, others = await asyncio.to_thread(self._counts)
        counts = {"running": running, "wanted": wanted, **others}
        if not running:
            message = "No replica is ready."
            return await _json({"status": "loading", "message": message, "replicas": counts}, 503)(scope, receive, send)
        told: dict[str, Any] = {}
        try:
            status, told = await asyncio.wait_for(self._ask(asked), 10)
        except (RayError, RayServeException, TimeoutError) as error:
            status, told = 503, {"status": "stalled", "message": f"No replica answers ({type(error).__name__})."}
        return await _json({**told, "replicas": counts}, status)(scope, receive, send)

    async def _ask(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        import json

        status, body = 0, b""
        async for message in self._replicas.options(stream=True).relay.remote(asked, b""):
            status, body = message.get("status", status), body + message.get("body", b"")
        return status, json.loads(body)

    def _counts(self) -> tuple[int, int, dict[str, int]]:
        """(running, wanted, those in other states by name)."""
        deployment = serve.status().applications[self._app_name].deployments[REPLICA]
        states = {getattr(state, "value", str(state)).lower(): n for state, n in deployment.replica_states.items() if n}
        running = states.pop("running", 0)
        leaving = states.get("stopping", 0)
        return running, running + sum(states.values()) - leaving, states


class Answer:
    """What a client has got of one answer. Its head waits for the first of its body: until then another replica may
    answer."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._head: Message | None = None
        self.started = self.ended = False

    async def pass_on(self, messages: AsyncIterator[Message]) -> None:
        async for message in messages:
            if message["type"] == "http.response.start":
                self._head = message
                continue
            if self._head is not None and not self.started:
                self.started = True
                await self._send(self._head)
            self.ended = _is_last(message)
            await self._send(message)

    async def end(self, error: MedusaServeError) -> None:
        """The terminal event of a stream, or an answer of its own where none has begun."""
        self.ended = True
        if not self.started:
            reply = reply_to(error)
            await self._send({"type": "http.response.start", "status": reply.status_code, "headers": reply.raw_headers})
            await self._send({"type": "http.response.body", "body": reply.body})
            return
        await self._send({"type": "http.response.body", "body": event(error.to_dict()) + DONE})


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


def _lost(started: bool) -> MedusaServeError:
    if started:
        return GenerationFailed("The replica that wrote this answer died; ask again.")
    return Unavailable("The replicas that were asked died; try again later.")


def _json(body: dict[str, Any], status: int) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(body, status, {"Retry-After": str(Unavailable.retry_after)} if status == 503 else None)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


# ---- the deployment --------------------------------------------------------------------------------------------------


def application(
    engine: EngineConfig, server: ServerConfig, config: ReplicasConfig, load: Load | None = None
) -> serve.Application:
    """What `serve.run` takes. load: makes a replica's model from the engine's config; LLM by default."""
    slots = engine.slots or DEFAULT_SLOTS
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas is not None:
        target = config.target_ongoing or slots
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.replicas, max_replicas=config.max_replicas, target_ongoing_requests=target
            )
        }
    deployment: Any = serve.deployment
    replicas = deployment(
        Replica,
        name=REPLICA,
        ray_actor_options={"num_gpus": config.gpus, "num_cpus": config.cpus},
        max_ongoing_requests=slots + engine.max_queue + 8,  # its engine refuses first; /health has to get through
        max_queued_requests=engine.max_queue if engine.max_queue else -1,
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        health_check_timeout_s=30,
        max_constructor_retry_count=1,
        **scaling,
    ).bind(engine, server, load)
    door = deployment(
        serve.ingress(None)(Door),
        name=DOOR,
        num_replicas=config.doors or max(config.replicas, config.max_replicas or 0),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,  # the replicas limit
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
    )
    made: serve.Application = door.bind(
        replicas, replace(server, api_key=None, guest_keys=())
    )  # the replicas ask for keys
    return made


def app(args: Mapping[str, Any]) -> serve.Application:
    """For `serve run medusa_serve.server.ray_app:app model=… replicas=2` and a YAML file's `args`: fields of
    EngineConfig, ServerConfig and ReplicasConfig. Raises InvalidConfig."""
    left, made = dict(args), []
    for kind in (EngineConfig, ServerConfig, ReplicasConfig):
        types = {field.name: str(field.type) for field in fields(kind)}
        mine = {name: _parsed(left.pop(name), types[name]) for name in list(left) if name in types}
        made.append(kind(**mine))
    if left:
        raise InvalidConfig(f"Unknown option {sorted(left)[0]!r}.", param=sorted(left)[0])
    engine, server, config = made
    return application(engine, server, config)  # type: ignore[arg-type]


def _parsed(value: Any, kind: str) -> Any:
    """`serve run name=value` gives strings."""
    if not isinstance(value, str) or kind.startswith("str"):
        return value
    if kind.startswith("bool"):
        return {"true": True, "false": False}.get(value.lower(), value)
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(value)
    return value
