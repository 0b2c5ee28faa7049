"""The chat page at /: one static file that holds no data, sent with a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse

FILE = Path(__file__).with_name("page.html")
FRAMES = (  # who may show it in a frame: Colab's output cells, notebooks of this machine
    "'self'",
    "https://colab.research.google.com",
    "https://*.googleusercontent.com",
    "https://*.colab.dev",
    "http://localhost:*",
    "http://127.0.0.1:*",
)


def add_page(app: FastAPI) -> None:
    """GET /, without a key: the page takes the key from its reader."""
    page, headers = content()

    @app.get("/", response_class=HTMLResponse)
    async def chat() -> Response:
        """A page to chat from. Needs no key to be read."""
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)


@cache
def content() -> tuple[bytes, dict[str, str]]:
    """The page and its headers. Its one script and one style are allowed by their hashes."""
    text = FILE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of(text, "script"),
        "style-src": _hash_of(text, "style"),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": " ".join(FRAMES),
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return text.encode(), {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def _hash_of(text: str, tag: str) -> str:
    """The CSP source of the only such element."""
    [inner] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"
