"""`medusa-serve serve`: its options, and the server from start to stop. uvicorn comes with the server."""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..config import EngineConfig
from ..errors import InvalidConfig
from ..server.config import ServerConfig
from ..server.start_lines import curl_line, key_lines, model_line, print_lines
from .options import add_engine_options, engine_config, refuse

if TYPE_CHECKING:
    from ..llm import LLM


# ---- options -----------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve a model over HTTP."
    add_engine_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="any other host than the default needs a key")
    group.add_argument("--port", type=int, default=8000, help="8000 by default; 0: any free one")
    group.add_argument("--max-queue", type=int, default=64, metavar="N", help="requests that may wait for a slot")
    about = "copies of the model at one address, a GPU each (without GPUs: a share of the cores); needs Ray Serve"
    group.add_argument("--replicas", type=int, default=1, metavar="N", help=about)
    group.add_argument("--api-key", metavar="KEY", help="or MEDUSA_SERVE_API_KEY; made where one is needed")
    about = "a further key to hand out, under limits per key; may be given several times; made without KEY"
    group.add_argument("--guest-key", metavar="KEY", action="append", nargs="?", const="", default=[], help=about)
    about = "a name of this server in Host headers; may be given several times (default: this machine's)"
    group.add_argument("--access-log", action="store_true", help="one line a request on stderr, without text or keys")
    group.add_argument("--allow-host", metavar="NAME", action="append", default=[], help=about)
    parser.set_defaults(run=run, parser=parser)


def server_config(options: argparse.Namespace) -> tuple[ServerConfig, bool]:
    """(config, whether its key, if it has one, is made here). Raises InvalidConfig."""
    given = options.api_key if options.api_key is not None else os.environ.get("MEDUSA_SERVE_API_KEY") or None
    config = ServerConfig(
        host=options.host,
        port=options.port,
        api_key=given,
        guest_keys=tuple(key or secrets.token_urlsafe(32) for key in options.guest_key),
        allowed_hosts=tuple(options.allow_host),
        access_log=options.access_log,
    )
    if config.api_key is None and (config.guest_keys or not config.is_loopback):
        config = replace(config, api_key=secrets.token_urlsafe(32))
    return config, given is None


# ---- from start to stop ------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    from ..cluster.config import ReplicasConfig

    try:
        engine = engine_config(options)
        server, key_is_ours = server_config(options)
        ReplicasConfig(replicas=options.replicas)
    except InvalidConfig as error:
        refuse(options, error)
    if options.replicas > 1:
        from ..cluster.command import serve_replicas

        serve_replicas(engine, server, options.replicas, as_json=options.json, key_is_ours=key_is_ours)
        return 0
    serve_until_stopped(engine, server, as_json=options.json, key_is_ours=key_is_ours)
    return 0


def serve_until_stopped(engine: EngineConfig, config: ServerConfig, *, as_json: bool, key_is_ours: bool) -> None:
    """Listen, load, print how to ask, serve until Ctrl-C or SIGTERM. Raises what loading raises; the port is bound
    before."""
    from ..server.background_load import BackgroundLoad
    from ..server.gc_freeze import loaded_is_kept
    from ..server.listen import bind, serve, url_of

    if config.access_log:
        logging.getLogger("medusa_serve.access").setLevel(logging.INFO)

    def load() -> Any:
        from ..llm import LLM

        llm = LLM(engine)
        kept.enter_context(loaded_is_kept())
        return llm

    with ExitStack() as kept, bind(config) as sock:
        url = url_of(sock)
        if not as_json:
            where = url if config.is_loopback else f"{url} (listening on {config.host}: use this machine's address)"
            first = f"medusa_serve {__version__} at {where}, loading {engine.model} …"
            print_lines(first, *key_lines(config, key_is_ours))
        source = BackgroundLoad(load)

        def print_when_ready() -> None:
            source.wait()
            if source.state == "ready":
                _print_ready(source.get(), url, config, as_json)

        threading.Thread(target=print_when_ready, name="medusa-ready", daemon=True).start()
        try:
            serve(source, config, sock=sock)
            if source.state == "failed":
                source.get()  # raises the reason
        finally:
            source.close()


def _print_ready(llm: LLM, url: str, config: ServerConfig, as_json: bool) -> None:
    key, guests = config.api_key, {"guest_keys": config.guest_keys} if config.guest_keys else {}
    curl, about = curl_line(url, key, llm.codec.has_chat_template), llm.describe()
    if as_json:
        print_lines(json.dumps({"url": url, "api_key": key, **guests, "curl": curl, **about, "notes": llm.notes}))
        return
    print_lines(model_line(about), *(f"  {note}" for note in llm.notes), "ready; try:", curl)
