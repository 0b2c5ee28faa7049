"""/info and /metrics: what is served, and how it goes."""

import threading
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from medusa_serve.server.background_load import BackgroundLoad
from medusa_serve.server.config import ServerConfig

from ...fakes import FakeRunner
from ..standins import HandLLM, ask, wait_for
from ..test_engine import fake_llm, rest

METRICS = {"method": "GET", "url": "/metrics"}


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """(name, label values) → value, by prometheus's own parser."""
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}


def test_info_names_the_model_and_every_limit_but_no_secret() -> None:
    config = ServerConfig(api_key="zqxj-key", guest_keys=("zqxj-guest",))
    headers = {"X-API-Key": "zqxj-key"}
    info, without = ask(
        HandLLM(),
        {"method": "GET", "url": "/info", "headers": headers},
        {"method": "GET", "url": "/info"},
        config=config,
    )
    body = info.json()
    assert (body["model_id"], body["max_total_tokens"], body["heads"]) == ("stand-in", 256, "none")
    assert (body["limits"]["max_body_bytes"], body["limits"]["max_stops"]) == (1 << 20, 4)
    assert "zqxj" not in info.text
    assert without.status_code == 401


def test_metrics_follow_what_happened() -> None:
    with fake_llm(FakeRunner(accept=(2, 0), eos_ids=frozenset({-1}))) as llm:
        body = {"prompt": "a", "max_tokens": 8}
        requests: list[dict[str, Any]] = [{"json": body}, {"json": {}}, {"url": "/zqxj"}, {"json": body}, METRICS]
        response = ask(llm, *requests)[-1]
        wait_for(lambda: rest(llm))
    assert response.headers["content-type"].startswith("text/plain")
    got = samples(response.text)
    assert got["medusa_serve_up", ()] == 1
    assert got["medusa_serve_requests_accepted_total", ()] == 2
    assert got["medusa_serve_requests_ended_total", ("length",)] == 2
    assert got["medusa_serve_requests_ended_total", ("error",)] == 0
    assert got["medusa_serve_tokens_emitted_total", ()] == 16
    accepted = got["medusa_serve_tokens_accepted_total", ()]
    assert 0 < accepted < got["medusa_serve_tokens_drafted_total", ()]
    by_depth = [got["medusa_serve_tokens_accepted_by_depth_total", (depth,)] for depth in ("1", "2")]
    assert sum(by_depth) == accepted
    assert got["medusa_serve_slots", ()] == 4
    assert got["medusa_serve_node_budget", ()] == 4  # two drafts fit into the smallest tree of four
    assert got["medusa_serve_first_token_seconds_count", ()] == got["medusa_serve_token_seconds_count", ()] == 2
    assert got["medusa_serve_http_answers_total", ("/generate", "200")] == 2
    assert got["medusa_serve_http_answers_total", ("/generate", "400")] == 1
    assert got["medusa_serve_http_answers_total", ("other", "404")] == 1
    assert "zqxj" not in response.text


def test_metrics_while_the_model_loads() -> None:
    gate = threading.Event()

    def load() -> HandLLM:
        gate.wait(10)
        return HandLLM()

    source = BackgroundLoad(load)
    (response,) = ask(source, METRICS)
    gate.set()
    source.close()
    assert (response.status_code, samples(response.text)["medusa_serve_up", ()]) == (200, 0)
