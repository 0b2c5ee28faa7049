"""`launch`: one call that loads, serves and shows a model. There is one server, however often it is called."""

from __future__ import annotations

import os
from typing import Any

from ..config import DEFAULT_MODEL, EngineConfig
from ..errors import InvalidConfig, LoadError, MedusaServeError
from ..server.config import ServerConfig
from . import env
from .background import running, wait_for_loads
from .server import LaunchOptions, Server


def launch(
    model: str = DEFAULT_MODEL,
    heads: str = "auto",
    *,
    public: bool = False,
    panel: bool = True,
    token: str | None = None,
    domain: str | None = None,
    **options: Any,
) -> Server:
    """Load a model with its heads, serve it in the background, show a panel; → the server.

    Called again with the same model and options it returns the server that runs. With others, or where that server has
    failed, it stops it first, but not for a model that does not exist. Raises InvalidConfig and LoadError with a
    sentence that says what to do; the cell can then be run again.

    public         also open an ngrok tunnel, which forces a key; where that fails, print why and serve without one
    panel          show the panel below the cell, where there is a front end
    token, domain  ngrok's, where they are not in the environment or the platform's secrets
    options        fields of EngineConfig and ServerConfig. Without `port`, 8000 or any free one
    """
    for name, value in (("public", public), ("panel", panel)):
        if not isinstance(value, bool):
            raise InvalidConfig(f"{name} must be true or false, not {value!r}.", param=name)
    server = _server(_asked(model, heads, options), needs_key=public)
    if public:
        try:
            server.open_tunnel(token=token, domain=domain)
        except MedusaServeError as error:
            print(f"no tunnel: {error.message}")
    else:
        server.close_tunnel()
    print(server.snippets())
    if panel and env.in_kernel():
        server.show()
    return server


def _server(asked: LaunchOptions, *, needs_key: bool) -> Server:
    """The server that runs if it is as asked and serves, else a new one."""
    old: Server | None = running()
    trouble = None if old is None else old.trouble
    if old is not None and old.asked == asked and trouble is None:
        print(f"already running: {old!r}".splitlines()[0])
        return old
    if old is not None:
        if trouble is not None:
            print(f"{old.name} does not serve any more: {trouble}")
        _require_model(asked.engine.model, old)
        print(f"replacing {old.name} …")
        old.stop()
    wait_for_loads()
    return Server(asked, needs_key=needs_key)


def _require_model(model: str, old: Server) -> None:
    """Raises LoadError where there is no such model: a typo does not end a server."""
    from ..model.loading.source import hf_config_of

    if model in (DEFAULT_MODEL, old.asked.engine.model) or not old.is_alive:
        return
    print(f"looking for {model} …")  # half a minute where there is no network
    try:
        hf_config_of(model)
    except LoadError as error:
        raise LoadError(f"{error.message} {old.name} goes on.") from error


def _asked(model: str, heads: str, options: dict[str, Any]) -> LaunchOptions:
    """Raises InvalidConfig for an unknown option or a value that makes no sense."""
    engine, server = EngineConfig.__dataclass_fields__, ServerConfig.__dataclass_fields__
    unknown = sorted(set(options) - set(engine) - set(server))
    if unknown:
        raise InvalidConfig(f"Unknown option {unknown[0]!r}.", param=unknown[0])
    if options.get("api_key") is None and os.environ.get("MEDUSA_SERVE_API_KEY"):
        options["api_key"] = os.environ["MEDUSA_SERVE_API_KEY"]
    return LaunchOptions(
        EngineConfig(model=model, heads=heads, **{name: value for name, value in options.items() if name in engine}),
        ServerConfig(**{"drain_s": 0.5} | {name: value for name, value in options.items() if name in server}),
        any_port="port" not in options,
    )
