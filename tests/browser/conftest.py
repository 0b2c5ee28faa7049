"""Headless Chromium. `.ci/browser` installs what these tests need and runs them; what is missing fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

WIDTHS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {
        "viewport": {"width": 390, "height": 780},
        "is_mobile": True,
        "has_touch": True,
        "device_scale_factor": 2,
    },
}


STRANGER = "elsewhere.test"  # a name that the browser finds on this machine


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser of playwright's, over the system's Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.fail("There is no chromium: run .ci/browser, which installs what these tests need.")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("There is no playwright: run .ci/browser, which installs what these tests need.")
    with sync_playwright() as playwright:
        quiet = ["--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        arguments = ["--no-sandbox", f"--host-resolver-rules=MAP {STRANGER} 127.0.0.1", *quiet]
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """visit(url, width) → a page of a fresh profile. page.problems holds errors, page.visited the requests' URLs."""
    opened = []

    def go(url: str, width: str = "desktop", **options: Any) -> Any:
        context = chromium.new_context(**WIDTHS[width] | options)
        context.set_default_timeout(20_000)
        opened.append(context)
        page = context.new_page()
        page.problems, page.visited, page.sent = [], [], []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
        page.on("request", lambda request: (page.visited.append(request.url), page.sent.append(request)))
        page.goto(url)
        return page

    yield go
    for context in opened:
        context.close()
