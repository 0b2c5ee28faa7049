"""The FastAPI app. Each request passes: host (400), key (401), size (413), route (404, 405), type (415), schema (400),
engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI

from .api.generate import add_generate
from .api.health import add_health
from .api.info import add_info
from .api.metrics import CountAnswers, add_metrics
from .api.openai import add_openai
from .api.page import add_page
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
from .router import DeltaRouter
from .submit import Shared
from .timeouts import Heartbeat, Watch


def create_app(source: ServedLLM | BackgroundLoad, config: ServerConfig) -> FastAPI:
    """All routes, for a model or for one that still loads. The caller closes `source`."""
    keys, hosts = Keys(config.api_key, config.guest_keys), Hosts(config.host, config.allowed_hosts)
    spent = Window(config.guest_tokens_per_minute, MINUTE)
    router, tokenizers = DeltaRouter(Watch(config), spent.add), ThreadPoolExecutor(2, "medusa-tokenize")
    traffic = Traffic()
    shared = Shared(lambda: loaded(source), config, keys, hosts, traffic, router, tokenizers)
    app = FastAPI(
        title="medusa_serve",
        docs_url="/docs" if config.is_loopback else None,
        redoc_url=None,
        redirect_slashes=False,  # its redirects are made from the client's Host header
    )
    app.state.shared = shared
    install(app)
    add_generate(app, shared)
    add_tgi(app, shared)
    add_openai(app, shared)
    add_info(app, shared)
    answers = add_metrics(app, shared)
    add_health(app, shared)
    _show_keys(app, keys)
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


def _show_keys(app: FastAPI, keys: Keys) -> None:
    """The OpenAPI page follows the keys, which may be asked for while the server runs."""
    plain = app.openapi
    app.openapi = lambda: secured(plain(), keys)  # type: ignore[method-assign]
