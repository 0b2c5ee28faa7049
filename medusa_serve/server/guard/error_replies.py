"""Errors as HTTP says them: one JSON shape for all of them, no echo of the input, no traceback to clients."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...engine.quiet_log import QuietLogger
from ...errors import InvalidRequest, MedusaServeError

log = QuietLogger(__name__)

FORMS = frozenset({"GenerateRequest", "TgiRequest"})  # of one endpoint's body, which pydantic puts into its paths
_MUST_BE = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dict_type": "an object",
}
_HTTP = {  # what the framework itself refuses: type, code, sentence
    400: ("invalid_request_error", "invalid_value", "The body is not valid JSON in UTF-8."),
    404: ("not_found_error", "not_found", "There is no such path here; try POST /generate or GET /health."),
    405: ("invalid_request_error", "method_not_allowed", "This path does not take that method; see the Allow header."),
}


class UnsupportedMediaType(MedusaServeError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class BodyTooLarge(MedusaServeError):
    status, type, code = 413, "invalid_request_error", "body_too_large"


class BodyTooSlow(MedusaServeError):
    status, type, code = 408, "timeout_error", "request_timeout"


class TooManyHeaders(MedusaServeError):
    status, type, code = 431, "invalid_request_error", "headers_too_large"


class Unauthorized(MedusaServeError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class NotFound(MedusaServeError):
    status, type, code = 404, "not_found_error", "not_found"


class RateLimited(MedusaServeError):
    """wait: seconds, for Retry-After."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(self, message: str, wait: int) -> None:
        super().__init__(message)
        self.retry_after = wait


class TooManyKeys(RateLimited):
    code = "too_many_wrong_keys"


def reply_to(error: MedusaServeError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response of an error of ours. X-Should-Retry stops clients that retry 5xx where that cannot help."""
    out = dict(headers or {})
    if error.retry_after is not None:
        out["Retry-After"] = str(error.retry_after)
    elif error.status >= 500 or error.status == 408:
        out["X-Should-Retry"] = "false"
    if error.status == 401:
        out["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.to_dict(), error.status, out)


def install(app: FastAPI) -> None:
    """Give `app` its error handlers."""

    @app.exception_handler(MedusaServeError)
    async def _ours(_: Request, error: MedusaServeError) -> JSONResponse:
        return reply_to(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return reply_to(explain(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        phrase = HTTPStatus(error.status_code).phrase + "."
        kind, code, message = _HTTP.get(error.status_code, ("invalid_request_error", None, phrase))
        body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
        return JSONResponse(body, error.status_code, error.headers)


def explain(errors: Seq[Any]) -> MedusaServeError:
    """The first thing wrong with a body, in one sentence of ours: pydantic's own report holds the input."""
    # of the branches of a union the one that got further says more
    error = next((e for e in errors if e["type"] == "string_unicode"), errors[0])
    kind, loc, ctx = error["type"], error["loc"][1:], error.get("ctx", {})
    loc = loc[1:] if loc and loc[0] in FORMS else loc
    if isinstance(ctx.get("error"), InvalidRequest):
        return ctx["error"]
    if kind == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON (near character {loc[0] if loc else 0}).")
    name = _path(loc)
    if name is None:
        return InvalidRequest("The body must be a JSON object with text in valid Unicode.")
    if kind == "extra_forbidden":
        known = re.fullmatch(r"[\w.\[\]-]{1,64}", name, re.ASCII)  # the name is the client's: short and tame, or unsaid
        return InvalidRequest(f"{name if known else 'A field'} is not a field of this request.", param=known and name)
    return InvalidRequest(_sentence(name, kind, ctx), param=name)


def _sentence(name: str, kind: str, ctx: Mapping[str, Any]) -> str:
    if kind == "missing":
        return f"{name} is missing."
    if kind == "string_unicode":
        return f"{name} is not valid Unicode: it holds half of a surrogate pair."
    if kind == "literal_error":
        return f"{name} must be {ctx['expected']}."
    if kind in ("too_short", "too_long"):
        bound = f"at least {ctx['min_length']}" if kind == "too_short" else f"at most {ctx['max_length']}"
        return f"{name} must have {bound} entries."
    if name.startswith("stop"):
        return "stop must be a string or a list of strings."
    return f"{name} must be {_MUST_BE.get(kind, 'of another type')}."


def _path(loc: Seq[Any]) -> str | None:
    """("messages", 0, "role") → "messages[0].role"; the names pydantic gives the branches of a union are left out."""
    if not loc or not isinstance(loc[0], str):
        return None
    parts = [part for part in loc[1:] if isinstance(part, int) or loc[0] not in ("stop", "prompt")]
    return loc[0] + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)


class LastResort:
    """ASGI middleware: an unexpected error becomes a 500 in our shape, and a line in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if scope["type"] != "http":
                raise
            log_crash(error)
            if not started:
                await reply_to(MedusaServeError("The server failed at this request."))(scope, receive, send)


def log_crash(error: BaseException) -> None:
    """Log where it happened. The exceptions' own words are left out: they may quote the prompt."""
    lines = []
    seen: BaseException | None = error
    while seen is not None:
        lines += [f"{type(seen).__module__}.{type(seen).__qualname__}\n", *traceback.format_tb(seen.__traceback__)]
        seen = seen.__cause__ or seen.__context__
    log.error("A request failed unexpectedly:\n%s", "".join(lines))
