"""GET /metrics for Prometheus: the engine's figures, read when they are asked for, and answers by path and status."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import MedusaServeError
from ..submit import Shared
from .schemas import documented

_COUNTERS = {  # name → key of Metrics.snapshot, help
    "requests_accepted": ("accepted_requests", "Sequences that were accepted."),
    "tokens_prefilled": ("prefilled", "Prompt tokens that ran through the model."),
    "tokens_reused": ("reused", "Prompt tokens found in a slot's KV cache."),
    "tokens_emitted": ("emitted", "Tokens of answers."),
    "tokens_drafted": ("drafted", "Draft tokens that were verified."),
    "tokens_accepted": ("accepted", "Draft tokens that became part of an answer."),
    "decode_steps": ("steps", "Decode steps, one for each sequence of a pass."),
    "retried_calls": ("retried_calls", "Passes that failed and ran row by row."),
    "restarts": ("restarts", "Times the engine started again after an error."),
}
_GAUGES = {
    "requests_running": ("running", "Sequences in a slot."),
    "requests_waiting": ("waiting", "Sequences that wait for a slot."),
    "slots": ("slots", "Sequences that may run together."),
    "node_budget": ("nodes", "Nodes of the tree in the last decode step; 1 is plain decoding."),
}


class EngineCollector(Collector):
    """Metric families of a batch manager's Metrics. None while the model loads."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def collect(self) -> Iterator[Metric]:
        try:
            manager = self._shared.llm().manager
        except MedusaServeError:
            yield GaugeMetricFamily("medusa_serve_up", "Whether the engine takes requests.", 0)
            return
        yield GaugeMetricFamily("medusa_serve_up", "Whether the engine takes requests.", manager.status().state == "ok")
        figures = manager.metrics.snapshot()
        for name, (key, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"medusa_serve_{name}", text, figures[key])
        for name, (key, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"medusa_serve_{name}", text, figures[key])
        ended = CounterMetricFamily("medusa_serve_requests_ended", "Sequences that ended.", labels=["outcome"])
        for outcome, count in figures["outcomes"].items():
            ended.add_metric([outcome], count)
        yield ended
        yield _by_depth(figures["num_accepted"])
        yield from manager.metrics.histograms()


def _by_depth(num_accepted: dict[int, int]) -> Metric:
    """A step that accepted three draft tokens accepted one at each of depths 1, 2 and 3."""
    family = CounterMetricFamily("medusa_serve_tokens_accepted_by_depth", "Accepted draft tokens.", labels=["depth"])
    for depth in range(1, max(num_accepted, default=0) + 1):
        family.add_metric([str(depth)], sum(count for number, count in num_accepted.items() if number >= depth))
    return family


class CountAnswers:
    """ASGI middleware: counts answers by route and status. Paths that nobody serves share one label."""

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self.app, self._counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._counter.labels(path=path, status=str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, watched)


def add_metrics(app: FastAPI, shared: Shared) -> Counter:
    """The route, over a registry of this app's own; → what CountAnswers counts in."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(shared))
    answers = Counter("medusa_serve_http_answers", "HTTP answers.", ["path", "status"], registry=registry)
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, responses=documented(401, 405) | text)
    async def metrics(request: Request) -> Response:
        """For Prometheus, in the format that the Accept header asks for."""
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": kind})

    return answers
