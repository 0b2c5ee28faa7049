"""The FastAPI app. Each request passes: host (400), key (401), size (413), route (404, 405), type (415), schema (400),
engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from ..errors import ContextTooLong, EngineDead, MedusaServeError, ModelLoading, Unavailable
from ..types import SamplingParams
from .access_log import AccessLog
from .auth import KeyGuard, Keys, secured
from .body import BodyLimit, json_only
from .config import ServerConfig
from .failures import LastResort, install
from .hosts import HostGuard, Hosts
from .limits import CHARS_PER_TOKEN
from .loading import BackgroundLoad, ServedLLM, loaded
from .page import add_page
from .rates import MINUTE, GuestLimits, Window
from .schemas import GenerateRequest, GenerateResponse, Health, documented
from .streaming import EventStream, Switchboard, Ticket, answer
from .watch import Heartbeat, Watch

LEFT = 499  # nobody reads it: the client is gone


@dataclass(frozen=True)
class Desk:
    """What the requests of one app share. `llm` raises while there is none."""

    llm: Callable[[], ServedLLM]
    config: ServerConfig
    keys: Keys
    hosts: Hosts
    switchboard: Switchboard
    tokenizers: ThreadPoolExecutor  # two threads: tokenising may take long, the event loop must not, nor all the cores


def create_app(source: ServedLLM | BackgroundLoad, config: ServerConfig) -> FastAPI:
    """POST /generate and GET /health for a model, or for one that still loads. The caller closes `source`."""
    keys, hosts = Keys(config.api_key, config.guest_keys), Hosts(config.host, config.allowed_hosts)
    spent = Window(config.guest_tokens_per_minute, MINUTE)
    switchboard, tokenizers = Switchboard(Watch(config), spent.add), ThreadPoolExecutor(2, "medusa-tokenize")
    desk = Desk(lambda: loaded(source), config, keys, hosts, switchboard, tokenizers)
    app = FastAPI(
        title="medusa_serve",
        docs_url="/docs" if config.is_loopback else None,
        redoc_url=None,
        redirect_slashes=False,  # its redirects are made from the client's Host header
    )
    app.state.desk = desk
    install(app)
    _add_generate(app, desk)
    _add_health(app, desk)
    _tell_of_keys(app, keys)
    add_page(app)
    # the last added is the outermost
    app.add_middleware(Heartbeat, seconds=config.heartbeat_s)
    app.add_middleware(BodyLimit, config=config)
    app.add_middleware(GuestLimits, config=config, spent=spent)
    app.add_middleware(KeyGuard, keys=keys, tries_per_minute=config.wrong_keys_per_minute)
    app.add_middleware(HostGuard, hosts=hosts)
    app.add_middleware(LastResort)
    if config.access_log:
        app.add_middleware(AccessLog)
    return app


def _tell_of_keys(app: FastAPI, keys: Keys) -> None:
    """The OpenAPI page follows the keys, which may be asked for while the server runs."""
    plain = app.openapi
    app.openapi = lambda: secured(plain(), keys)  # type: ignore[method-assign]


def _add_generate(app: FastAPI, desk: Desk) -> None:
    @app.post(
        "/generate",
        response_model=GenerateResponse,
        responses=documented(400, 401, 404, 405, 408, 413, 415, 429, 431, 500, 503, 504, stream=True),
        dependencies=[Depends(json_only)],
    )
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Complete a prompt or answer a chat."""
        params, llm = body.sampling_params(), ready(desk)
        ticket = await admit(desk, llm, body.source(), params, tenant=request.state.tenant.name)
        token_ids = bool(body.return_token_ids)
        if body.stream:
            return EventStream(ticket, token_ids=token_ids, merge_s=desk.config.merge_ms / 1000)
        completion = await answer(ticket, request.receive)
        if completion is None:
            return Response(status_code=LEFT)
        return JSONResponse(completion.to_dict(token_ids=token_ids))


def _add_health(app: FastAPI, desk: Desk) -> None:
    @app.get("/health", response_model=Health, responses=documented(405) | {503: {"model": Health}})
    async def health() -> Response:
        """200 when a request would be served now. Needs no key."""
        status, body = health_of(desk)
        waiting_helps = body["status"] in ("loading", "stalled", "restarting", "draining")
        return JSONResponse(body, status, {"Retry-After": str(Unavailable.retry_after)} if waiting_helps else None)


async def admit(
    desk: Desk, llm: ServedLLM, source: str | list[dict[str, str]], params: SamplingParams, *, tenant: str
) -> Ticket:
    """Tokenise off the event loop and submit. Raises what either refuses; the ticket must be closed."""
    context = llm.describe()["max_context"]
    num_chars = len(source) if isinstance(source, str) else sum(len(message["content"]) for message in source)
    if num_chars > CHARS_PER_TOKEN * context:
        field = "prompt" if isinstance(source, str) else "messages"
        raise ContextTooLong(f"{field} has {num_chars} characters, which cannot fit {context} tokens.", param=field)
    encode: Any = llm.codec.encode if isinstance(source, str) else llm.codec.encode_chat
    ids = await asyncio.get_running_loop().run_in_executor(desk.tokenizers, encode, source)
    return desk.switchboard.submit(llm.manager, ids, params, key=tenant)


def ready(desk: Desk) -> ServedLLM:
    """The model, or an error that HTTP calls 503: that loading failed is no fault of this request."""
    try:
        return desk.llm()
    except Unavailable:
        raise
    except MedusaServeError as error:
        raise EngineDead(error.message) from None


def health_of(desk: Desk) -> tuple[int, dict[str, Any]]:
    """Status code and body of GET /health."""
    try:
        llm = desk.llm()
    except ModelLoading as error:
        return 503, {"status": "loading", "message": error.message}
    except Unavailable as error:
        return 503, {"status": "draining", "message": error.message}
    except MedusaServeError as error:
        # with a key the server may be public, and the reason may name files of this machine
        public = "The model could not be loaded; the server's console says why."
        return 503, {"status": "failed", "message": public if desk.keys.required else error.message}
    status = llm.manager.status()
    if status.state == "ok":
        return 200, {**llm.describe(), "status": "ok", "running": status.running, "waiting": status.waiting}
    state = "draining" if status.state == "closed" else status.state
    return 503, {"status": state, "message": status.message or f"The engine is {state}."}
