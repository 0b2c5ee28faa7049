"""The FastAPI app. Each request passes: host (400), key (401), size (413), route (404, 405), type (415), schema (400),
engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from ..errors import MedusaServeError, ModelLoading, Unavailable
from .api.generate import add_generate
from .api.info import add_info
from .api.metrics import CountAnswers, add_metrics
from .api.openai import add_openai
from .api.page import add_page
from .api.schemas import Health, HealthState, documented
from .api.tgi import add_tgi
from .background_load import BackgroundLoad, ServedLLM, loaded
from .config import ServerConfig
from .guard.access_log import AccessLog
from .guard.body import BodyLimit
from .guard.error_replies import LastResort, install
from .guard.hosts import HostGuard, Hosts
from .guard.keys import KeyGuard, Keys, secured
from .guard.rates import MINUTE, GuestLimits, Window
from .guard.request_id import RequestId
from .guard.traffic import CountTraffic, Traffic
from .streaming import Switchboard
from .submit import Desk
from .timeouts import Heartbeat, Watch

PASSING: frozenset[HealthState] = frozenset({"loading", "stalled", "restarting", "draining"})  # a client may wait


def create_app(source: ServedLLM | BackgroundLoad, config: ServerConfig) -> FastAPI:
    """All routes, for a model or for one that still loads. The caller closes `source`."""
    keys, hosts = Keys(config.api_key, config.guest_keys), Hosts(config.host, config.allowed_hosts)
    spent = Window(config.guest_tokens_per_minute, MINUTE)
    switchboard, tokenizers = Switchboard(Watch(config), spent.add), ThreadPoolExecutor(2, "medusa-tokenize")
    traffic = Traffic()
    desk = Desk(lambda: loaded(source), config, keys, hosts, traffic, switchboard, tokenizers)
    app = FastAPI(
        title="medusa_serve",
        docs_url="/docs" if config.is_loopback else None,
        redoc_url=None,
        redirect_slashes=False,  # its redirects are made from the client's Host header
    )
    app.state.desk = desk
    install(app)
    add_generate(app, desk)
    add_tgi(app, desk)
    add_openai(app, desk)
    add_info(app, desk)
    answers = add_metrics(app, desk)
    _add_health(app, desk)
    _tell_of_keys(app, keys)
    add_page(app)
    # the last added is the outermost
    app.add_middleware(Heartbeat, seconds=config.heartbeat_s)
    app.add_middleware(BodyLimit, config=config)
    app.add_middleware(GuestLimits, config=config, spent=spent)
    app.add_middleware(KeyGuard, keys=keys, tries_per_minute=config.wrong_keys_per_minute)
    app.add_middleware(CountTraffic, traffic=traffic)
    app.add_middleware(HostGuard, hosts=hosts)
    app.add_middleware(LastResort)
    app.add_middleware(CountAnswers, counter=answers)
    app.add_middleware(RequestId)
    if config.access_log:
        app.add_middleware(AccessLog)
    return app


def _tell_of_keys(app: FastAPI, keys: Keys) -> None:
    """The OpenAPI page follows the keys, which may be asked for while the server runs."""
    plain = app.openapi
    app.openapi = lambda: secured(plain(), keys)  # type: ignore[method-assign]


def _add_health(app: FastAPI, desk: Desk) -> None:
    @app.get("/health", response_model=Health, responses=documented(405) | {503: {"model": Health}})
    async def health() -> Response:
        """200 when a request would be served now. Needs no key."""
        status, body = health_of(desk)
        waiting_helps = body["status"] in PASSING
        return JSONResponse(body, status, {"Retry-After": str(Unavailable.retry_after)} if waiting_helps else None)


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
    state: HealthState = "draining" if status.state == "closed" else status.state
    return 503, {"status": state, "message": status.message or f"The engine is {state}."}
