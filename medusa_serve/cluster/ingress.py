"""What clients connect to: it has no model; it passes each request to a replica, and ends its answer if that dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import Any

import aiohttp
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.util import get_node_ip_address
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ..errors import GenerationFailed, MedusaServeError, QueueFull, Unavailable
from ..server.config import ServerConfig
from ..server.events import unless_gone
from ..server.guard.body import BodyLimit
from ..server.guard.error_replies import LastResort
from .permits import Misdirected
from .relay import RelayedAnswer, Upstream

log = logging.getLogger(__name__)

REPLICA, INGRESS = "Replica", "Ingress"  # as `serve status` names them
TRIES = 3  # replicas that are asked for one answer, while nothing of it was sent
LOST = (RayError, RayServeException, aiohttp.ClientError, Misdirected)  # of a replica that cannot answer
HEALTH_S = 10.0


class Ingress:
    """Passes requests on to replicas, answers /health for all of them, and ends the answers of a replica that dies."""

    def __init__(self, replicas: Any, server: ServerConfig) -> None:
        self._replicas, self._config = replicas, server
        self._permits = replicas.options(stream=True)
        self._app_name, self._node = serve.get_replica_context().app_name, get_node_ip_address()
        self._upstream: Upstream | None = None  # made in the loop that it belongs to

    def __serve_build_asgi_app__(self) -> Any:
        return LastResort(BodyLimit(self._request, self._config))

    async def about(self) -> dict[str, Any]:
        """`Replica.about` of one of them."""
        about: dict[str, Any] = await self._replicas.about.remote()
        return about

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        body = (await receive()).get("body", b"")  # all of it: BodyLimit has read it
        if scope["path"] == "/health" and scope["method"] == "GET":
            return await self._health(scope, receive, send)
        with contextlib.suppress(OSError):  # newer ASGI servers: the client has left
            await unless_gone(receive, self._relayed(scope, body, send))
        return None

    async def _relayed(self, scope: Scope, body: bytes, send: Send) -> None:
        for attempt in range(1, TRIES + 1):
            answer = RelayedAnswer(send)
            try:
                async with await self._asked(scope, body) as response:
                    return await answer.pass_on(response)
            except BackPressureError:
                return await answer.end(QueueFull("All replicas are full; try again later."))
            except LOST as error:
                log.warning("A replica failed at a request: %s.", type(error).__name__)
                if answer.started or attempt == TRIES:
                    return await answer.end(_lost(answer.started))

    async def _asked(self, scope: Scope, body: bytes) -> aiohttp.ClientResponse:
        """The head of a replica's answer. Ray chooses the least busy one, and counts the request there until its answer
        is over. Raises LOST, BackPressureError."""
        if self._upstream is None:
            self._upstream = Upstream(self._config.total_s + self._config.first_token_s)
        permits = self._permits.permit.remote(self._node)
        try:
            address, permit = await anext(permits)
            return await self._upstream.ask(address, permit, scope, body)
        except asyncio.CancelledError:
            permits.cancel()
            raise

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A running replica's own /health, and how many there are; 503 where none runs."""
        running, wanted, others = await asyncio.to_thread(self._counts)
        counts = {"running": running, "wanted": wanted, **others}
        if not running:
            message = "No replica is ready."
            return await _json({"status": "loading", "message": message, "replicas": counts}, 503)(scope, receive, send)
        body: dict[str, Any] = {}
        try:
            async with asyncio.timeout(HEALTH_S), await self._asked(scope, b"") as response:
                status, body = response.status, json.loads(await response.read())
        except (*LOST, TimeoutError) as error:
            status, body = 503, {"status": "stalled", "message": f"No replica answers ({type(error).__name__})."}
        return await _json({**body, "replicas": counts}, status)(scope, receive, send)

    def _counts(self) -> tuple[int, int, dict[str, int]]:
        """(running, wanted, the number in each other state by name)."""
        deployment = serve.status().applications[self._app_name].deployments[REPLICA]
        states = {getattr(state, "value", str(state)).lower(): n for state, n in deployment.replica_states.items() if n}
        running = states.pop("running", 0)
        leaving = states.get("stopping", 0)
        return running, running + sum(states.values()) - leaving, states

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.shutdown" and self._upstream is not None:
                await self._upstream.close()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return


def _lost(started: bool) -> MedusaServeError:
    if started:
        return GenerationFailed("The replica that wrote this answer died; ask again.")
    return Unavailable("The replicas that were asked died; try again later.")


def _json(body: dict[str, Any], status: int) -> JSONResponse:
    return JSONResponse(body, status, {"Retry-After": str(Unavailable.retry_after)} if status == 503 else None)
