"""The corpus, sent to each endpoint with and without a stream: never a 5xx, the right status, the one shape of errors,
nothing echoed. The default suite sends every eighth body, `-m server` all of them."""

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from medusa_serve.server.app import create_app
from medusa_serve.server.config import ServerConfig

from ..fakes import FakeRunner
from .corpus import CONTEXT, ENDPOINTS, MARK, Case, cases
from .standins import error_of, events
from .test_engine import FakeLLM, fake_llm

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

JSON = {"content-type": "application/json"}


def streamed(case: Case) -> Case | None:
    """The same with a stream, where the body is an object that does not say otherwise."""
    if not case.body.startswith("{") or '"stream"' in case.body or case.body == "{":
        return None
    return case._replace(body='{"stream": true' + (", " if case.body[1] != "}" else "") + case.body[1:])


def send(endpoint: str, chosen: list[Case]) -> Counter[int]:
    """All of them, one after the other, each checked. → how many got which status"""
    wrong: list[str] = []
    counted: Counter[int] = Counter()

    async def go(llm: FakeLLM) -> None:
        transport = httpx.ASGITransport(create_app(llm, ServerConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for case in chosen:
                reply = await client.post(endpoint, content=case.body.encode(), headers=JSON)
                counted[reply.status_code] += 1
                problem = problem_of(case, reply)
                if problem:
                    wrong.append(f"{endpoint} {case.status} {case.body[:120]} → {problem}")

    with fake_llm(FakeRunner(max_context=CONTEXT, reply=(258, 259, 260))) as llm:
        asyncio.run(go(llm))
        figures = llm.manager.metrics.snapshot()
    assert figures["outcomes"]["error"] == figures["restarts"] == figures["retried_calls"] == 0
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong[:40])
    return counted


def problem_of(case: Case, reply: Any) -> str | None:
    """What is wrong with a reply; None: nothing."""
    if reply.status_code != case.status:
        return f"{reply.status_code} {reply.text[:200]}"
    if reply.status_code == 200:
        if reply.headers["content-type"].startswith("text/event-stream"):
            return None if case.body.startswith('{"stream"') and events(reply.text) else "an odd stream"
        return None if " the a cat"[:4] in json.dumps(reply.json()) else "an odd answer"
    error = error_of(reply)
    if error["type"] not in ("invalid_request_error", "not_found_error"):
        return f"type {error['type']}"
    if case.param and not (error["param"] or "").startswith(case.param):
        return f"param {error['param']}"
    if MARK in reply.text or len(reply.content) > 500:
        return f"an echo: {reply.text[:200]}"
    return None


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_eighth_body(endpoint: str) -> None:
    chosen = cases(endpoint)[::8]
    send(endpoint, [*chosen, *filter(None, map(streamed, chosen[::2]))])


@pytest.mark.server
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_body_with_and_without_a_stream(endpoint: str) -> None:
    plain = cases(endpoint)
    assert len({case.body for case in plain}) == len(plain) >= 300
    both = [*plain, *filter(None, map(streamed, plain))]
    counted = send(endpoint, both)
    assert sum(counted.values()) == len(both) >= 550
    assert set(counted) <= {200, 400, 404}
    assert counted[200] >= 60


@pytest.mark.parametrize(("status", "body"), [(200, {"error": 1}), (500, {}), (400, {"detail": [MARK]})])
def test_a_server_that_errs_is_seen(status: int, body: Any) -> None:
    """The oracle itself: a wrong status, another shape, an echo."""
    reply = httpx.Response(status, json=body)
    case = Case("{}", 400)
    try:
        assert problem_of(case, reply)
    except AssertionError:
        assert status == case.status  # error_of found the shape wrong
