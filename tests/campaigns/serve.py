"""HTTP load on a server, as its clients see it: `python -m tests.campaigns serve`.

closed loop  N clients, each of which sends its next request when its last one has ended
open loop    requests at random times at a given rate, whether or not the server keeps up

All are streamed answers of POST /generate. Without --url the server is started here, and HTTP is compared with the same
engine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from medusa_serve.bench.command import end_options, numbers, run_bench
from medusa_serve.config import EngineConfig, check_int
from medusa_serve.errors import InvalidConfig, LoadError
from medusa_serve.types import SamplingParams

from . import http_load
from .http_load import PERCENTILES, Sample, Target, summary
from .serving import served

if TYPE_CHECKING:
    from medusa_serve.llm import LLM

RunLoad = Callable[..., list[Sample]]
TURNS = 4  # requests of a client beside the engine alone: of a single one, more than half may be its way in
RULE = (
    "Greedy streamed answers of at most {tokens} tokens to the built-in questions, numbered, so that no two prompts "
    "are the same; clients in a process of their own. first_token_ms: from when a request was due to its first token. "
    "token_ms: from its first token to its end, over the tokens after the first. total_ms: from when it was due to "
    "its end. Percentiles over whole answers; tokens_per_second: all tokens that came, over the time from the first "
    "request to the last end. http_over_engine: the same prompts in turn over HTTP and by the engine alone, both a "
    "closed loop of {turns} requests a client; medians of {rounds} rounds after one that warms up, and their ratio."
)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """url: of a server that runs; None: one is started · key: its API key · clients: closed loops · rates: open loops,
    requests a second · seconds: that new requests are sent in each · requests: of each, instead of seconds · tokens: of
    an answer at most · rounds: of the comparison with the engine alone · seed: of the arrival times"""

    url: str | None = None
    key: str | None = None
    clients: tuple[int, ...] = (1, 4, 16)
    rates: tuple[float, ...] = ()
    seconds: float = 10.0
    requests: int | None = None
    tokens: int = 96
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise InvalidConfig(f"url must begin with http:// or https://, not be {self.url!r}.", param="url")
        if len(set(self.clients)) < len(self.clients) or not all(1 <= count <= 1024 for count in self.clients):
            raise InvalidConfig("clients must be different numbers from 1 to 1024.", param="clients")
        if len(set(self.rates)) < len(self.rates) or not all(0 < rate <= 10_000 for rate in self.rates):
            raise InvalidConfig("rates must be different numbers above 0, up to 10000.", param="rates")
        if not self.clients and not self.rates:
            raise InvalidConfig("There is nothing to measure: neither clients nor rates.", param="clients")
        if not 0 < self.seconds <= 86_400:
            raise InvalidConfig("seconds must be a number above 0, up to 86400.", param="seconds")
        check_int(self, "requests", max((1, *self.clients)), 10**6, optional=True)
        check_int(self, "tokens", 2, 2**20)
        check_int(self, "rounds", 1, 100)
        check_int(self, "seed", 0, 2**63 - 1)


# ---- the run ---------------------------------------------------------------------------------------------------------


def bench_serve(engine: EngineConfig, config: ServeConfig) -> dict[str, Any]:
    """All loads, one after the other. Raises LoadError: no server answers at the url, or the model cannot be had."""
    from medusa_serve.bench.facts import command, facts, rested
    from medusa_serve.bench.questions import read_prompts

    questions = read_prompts().questions
    with _server(engine, config) as (url, llm), http_load.clients() as run:
        health = health_of(url)
        target = Target(url, questions, config.tokens, chat=_takes_chats(run, url, config.key), key=config.key)
        if llm is not None:
            rested(llm)
        compared = [] if llm is None else [over_engine(run, llm, target, n, config.rounds) for n in config.clients]
        loads = list(_loads(run, target, config))
    names = ("clients", "rates", "seconds", "requests", "tokens", "rounds", "seed")
    return {
        "kind": "serve",
        "rule": RULE.format(tokens=config.tokens, rounds=config.rounds, turns=TURNS),
        "machine": facts(),
        "command": command("tests.campaigns"),
        "url": config.url,
        "engine": health,
        "options": {name: getattr(config, name) for name in names},
        "loads": loads,
        "http_over_engine": compared,
    }


@contextmanager
def _server(engine: EngineConfig, config: ServeConfig) -> Iterator[tuple[str, LLM | None]]:
    """(url, its model); the model of a server that is not ours is None."""
    if config.url is not None:
        yield config.url.rstrip("/"), None
        return
    from medusa_serve.llm import LLM
    from medusa_serve.server.gc_freeze import loaded_is_kept

    # a closed loop is never refused; an open one may be
    queue = max((engine.max_queue, *config.clients))
    with LLM(replace(engine, max_queue=queue)) as llm, loaded_is_kept(), served(llm) as url:
        yield url, llm


def health_of(url: str) -> dict[str, Any]:
    """What the server says of itself. Raises LoadError where it does not answer, or is not ready."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as response:
            health = json.loads(response.read())
    except (OSError, ValueError, HTTPException) as error:
        raise LoadError(f"No server is ready at {url}: {error}.") from error
    if not isinstance(health, dict):
        raise LoadError(f"What answers at {url} is no server of this kind.")
    return {name: health[name] for name in health if name not in ("status", "running", "waiting")}


def _takes_chats(run: RunLoad, url: str, key: str | None) -> bool:
    """Whether it knows a chat template. Raises LoadError where it answers neither a chat nor raw text."""
    for chat in (True, False):
        sample = run(http_load.closed_loop, Target(url, ["Hello"], 2, chat=chat, key=key), 1, 0, 1, 0.0)[0]
        if sample.ok:
            return chat
        if sample.status != "400":  # of a chat where there is no template
            break
    raise LoadError(f"The server at {url} does not answer: {sample.status}.")


def _loads(run: RunLoad, target: Target, config: ServeConfig) -> Iterator[dict[str, Any]]:
    from medusa_serve.training.pipeline import ProgressLine

    line, start = ProgressLine(every_elsewhere=0.0), max((0, *config.clients))  # new prompts for each load
    for count in config.clients:
        line.show(f"closed loop, clients: {count}")
        samples = run(http_load.closed_loop, target, count, start, config.requests, config.seconds)
        start += len(samples)
        yield {"loop": "closed", "clients": count} | summary(samples)
    for rate in config.rates:
        line.show(f"open loop, requests/s: {rate:g}")
        due = http_load.arrivals(rate, config.seed, config.requests, config.seconds)
        samples = run(http_load.open_loop, target, due, start)
        start += len(samples)
        yield {"loop": "open", "rate": rate} | summary(samples)
    line.leave()


# ---- HTTP over the engine alone --------------------------------------------------------------------------------------


def over_engine(run: RunLoad, llm: LLM, target: Target, together: int, rounds: int) -> dict[str, Any]:
    """tokens/s of `together` sequences, the next one when one has ended, over HTTP and by the engine alone, in turn.

    The prompts are the same in all rounds, so what a KV prefix saves it saves both.
    """
    from medusa_serve.bench.facts import rested

    requests = TURNS * together
    ids = [_ids(llm, target.body(number)) for number in range(requests)]
    params = SamplingParams(max_tokens=target.tokens)
    speeds: dict[str, list[float]] = {"http": [], "engine": []}
    for index in range(rounds + 1):
        rested(llm)
        samples = run(http_load.closed_loop, target, together, 0, requests, 0.0)
        failed = [sample.status for sample in samples if not sample.ok]
        if failed:
            raise LoadError(f"{len(failed)} of {requests} streams failed: {failed[0]}.")
        began = time.perf_counter()
        answers = llm.generate_ids(ids, params, at_once=together)
        alone_s = time.perf_counter() - began
        if index:
            speeds["http"].append(sum(s.tokens for s in samples) / max(s.end for s in samples))
            speeds["engine"].append(sum(answer.completion_tokens for answer in answers) / alone_s)
    http, engine = (statistics.median(speeds[name]) for name in ("http", "engine"))
    return {
        "clients": together,
        "http_tokens_per_second": round(http, 2),
        "engine_tokens_per_second": round(engine, 2),
        "ratio": round(http / engine, 3),
        "tokens": [sum(sample.tokens for sample in samples), sum(answer.completion_tokens for answer in answers)],
        "rounds": {name: [round(value, 2) for value in values] for name, values in speeds.items()},
    }


def _ids(llm: LLM, body: dict[str, Any]) -> list[int]:
    return llm.codec.encode_chat(body["messages"]) if "messages" in body else llm.codec.encode(body["prompt"])


# ---- for a person ----------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    engine, facts = result["engine"], result["machine"]
    where = f"{result['url']} asked from" if result["url"] else "its own server on"
    device = facts["cpu"] if engine.get("device") == "cpu" else facts["device"]
    lines = [
        f"{engine.get('model')} in {engine.get('dtype')}, {engine.get('heads')} heads, {engine.get('slots')} slots, "
        f"{where} {device}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}",
        f"{'':25}{'answers':>9}{'tokens/s':>10}{'first token ms: p50':>22}{'p95':>9}{'p99':>9}"
        f"{'ms a token: p50':>18}{'p95':>9}{'p99':>9}  errors",
    ]
    for load in result["loads"]:
        closed = load["loop"] == "closed"
        name = f"closed loop, clients: {load['clients']}" if closed else f"open loop, {load['rate']:g}/s"
        errors = ", ".join(f"{count} × {status}" for status, count in load["errors"].items()) or "none"
        times = _cells(load["first_token_ms"], 22) + _cells(load["token_ms"], 18)
        lines.append(f"{name:25}{load['whole']:9}{load['tokens_per_second']:10.1f}{times}  {errors}")
    for row in result["http_over_engine"]:
        speeds = f"{row['http_tokens_per_second']} / {row['engine_tokens_per_second']} tokens/s"
        lines.append(f"HTTP over the engine alone, {row['clients']} at a time: {row['ratio']:.2f}x  ({speeds})")
    if result["url"]:
        lines.append("HTTP over the engine alone: left out, as the server's engine is not in this process")
    return "\n".join(lines)


def _cells(values: dict[str, float] | None, width: int) -> str:
    shown = [f"{value:.1f}" for value in values.values()] if values else ["-"] * len(PERCENTILES)
    return f"{shown[0]:>{width}}" + "".join(f"{value:>9}" for value in shown[1:])


# ---- the command -----------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slots", type=int, metavar="N", help="sequences that decode together (default: from memory)")
    parser.add_argument("--url", help="of a server that runs (default: one is started, with these options)")
    parser.add_argument("--api-key", metavar="KEY", help="of that server, or MEDUSA_SERVE_API_KEY")
    parser.add_argument("--clients", type=numbers(int), metavar="N,…", help="closed loops (1,4,16; none with --rate)")
    parser.add_argument(
        "--rate", dest="rates", type=numbers(float), metavar="R,…", help="open loops: requests a second"
    )
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--seconds", type=float, metavar="T", help="that each load sends new requests (10)")
    end.add_argument("--requests", type=int, metavar="N", help="of each load, instead")
    parser.add_argument("--tokens", type=int, metavar="N", help="of an answer at most (96)")
    parser.add_argument("--rounds", type=int, metavar="N", help="of the comparison with the engine alone (3)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the open loops' arrival times (0)")
    end_options(parser, run)


def run(options: argparse.Namespace) -> int:
    key = options.api_key if options.api_key is not None else os.environ.get("MEDUSA_SERVE_API_KEY") or None
    options.key = key if options.url else None
    if options.rates is not None and options.clients is None:
        options.clients = ()
    return run_bench(options, "serve", ServeConfig, bench_serve, table)
