"""GET /: one static file, closed to everything else. What it does in a browser: tests/browser."""

from __future__ import annotations

import base64
import hashlib
import re

from medusa_serve.notebook.panel.run_colours import COLOURS
from medusa_serve.server.api.page import FILE
from medusa_serve.server.config import ServerConfig

from ..standins import HandLLM, ask

TEXT = FILE.read_text(encoding="utf-8")


def test_the_page_needs_no_key_and_holds_none() -> None:
    page, generate, other = ask(
        HandLLM(),
        {"method": "GET", "url": "/"},
        {"json": {"prompt": "x"}},
        {"method": "GET", "url": "/index.html"},
        config=ServerConfig(api_key="the-secret"),
    )
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text == TEXT
    assert "the-secret" not in page.text + str(page.headers)
    assert generate.status_code == 401
    assert other.status_code == 401


def test_it_is_sent_with_a_policy_that_allows_its_own_script_and_nothing_else() -> None:
    [page] = ask(HandLLM(), {"method": "GET", "url": "/"})
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        [inner] = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.S)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "*" not in policy["frame-ancestors"].split()
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["cache-control"] == "no-store"


def test_it_asks_for_nothing_from_elsewhere_and_stores_nothing() -> None:
    without_icon = re.sub(r'<link rel="icon"[^>]*>', "", TEXT)
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"(?m)(^|\s)// .*$", "", without_icon)), (
        "an address of elsewhere"
    )
    assert not re.search(r"\b(src|action)=|@import|url\(", without_icon)
    assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie|innerHTML|eval\(", TEXT)
    assert not re.search(r"\son[a-z]+=", without_icon.split("<script>")[0]), "a handler that the policy would block"
    assert set(re.findall(r'fetch\("([^"]*)"', TEXT)) == {"health", "generate"}, "relative, for pages below a path"


def test_its_tints_are_the_panels() -> None:
    light = TEXT.split("@media", 1)[0]
    assert {int(run): tint for run, tint in re.findall(r"--t(\d): (#\w+)", light)} == COLOURS


def test_other_methods_are_untouched_and_the_openapi_page_has_it() -> None:
    put, openapi = ask(HandLLM(), {"method": "PUT", "url": "/", "json": {}}, {"method": "GET", "url": "/openapi.json"})
    assert put.status_code == 405
    assert list(openapi.json()["paths"]["/"]["get"]["responses"]["200"]["content"]) == ["text/html"]
