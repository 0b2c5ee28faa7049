"""GET /health: whether a request would be served now, and what runs."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from ...errors import MedusaServeError, ModelLoading, Unavailable
from ..submit import Shared
from .schemas import Health, HealthState, documented

PASSING: frozenset[HealthState] = frozenset({"loading", "stalled", "restarting", "draining"})  # a client may wait


def add_health(app: FastAPI, shared: Shared) -> None:
    @app.get("/health", response_model=Health, responses=documented(405) | {503: {"model": Health}})
    async def health() -> Response:
        """200 when a request would be served now. Needs no key."""
        status, body = health_of(shared)
        waiting_helps = body["status"] in PASSING
        return JSONResponse(body, status, {"Retry-After": str(Unavailable.retry_after)} if waiting_helps else None)


def health_of(shared: Shared) -> tuple[int, dict[str, Any]]:
    """Status code and body of GET /health."""
    try:
        llm = shared.llm()
    except ModelLoading as error:
        return 503, {"status": "loading", "message": error.message}
    except Unavailable as error:
        return 503, {"status": "draining", "message": error.message}
    except MedusaServeError as error:
        # with a key the server may be public, and the reason may name files of this machine
        public = "The model could not be loaded; the server's console says why."
        return 503, {"status": "failed", "message": public if shared.keys.required else error.message}
    status = llm.manager.status()
    if status.state == "ok":
        return 200, {**llm.describe(), "status": "ok", "running": status.running, "waiting": status.waiting}
    state: HealthState = "draining" if status.state == "closed" else status.state
    return 503, {"status": state, "message": status.message or f"The engine is {state}."}
