"""Load until it hurts, and what must hold then: `python -m tests.campaigns load`.

closed loop  64 streaming clients for minutes
open loop    requests at random times, at shares of the capacity that the closed loop showed
burst        500 requests within a second
storms       five times 200 clients that leave within half a second

All come over loopback from another process. After each the invariants are checked (invariants.py).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from medusa_serve.bench.command import end_options, run_bench
from medusa_serve.config import EngineConfig, check_int
from medusa_serve.errors import InvalidConfig

from . import http_load
from .http_load import Sample, Target, percentile, summary
from .invariants import REFUSED, Invariants
from .serving import served

SHARES = (0.5, 0.8, 1.0, 2.0, 4.0)  # of the capacity; those below 1 must not be refused
LAG_S = 0.01  # the server's event loop is asked so often how late it is
LAG_P99_MS = 50.0
RULE = (
    "Greedy streamed answers of at most {tokens} tokens to the built-in questions, numbered; clients in another "
    "process. capacity: answers a second of the closed loop. lag: how much later than asked for the server's event "
    "loop wakes, every 10 ms, during all loads. canary_s: a fixed prompt's answer after each load. Compared with the "
    "state after a burst that is not counted."
)


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """clients, seconds: of the closed loop · open_seconds: of each open one · burst: requests in a second · storms of
    storm clients · tokens: of an answer at most · seed: of all random times"""

    clients: int = 64
    seconds: float = 180.0
    open_seconds: float = 30.0
    burst: int = 500
    storms: int = 5
    storm: int = 200
    tokens: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("clients", 1024), ("burst", 5000), ("storms", 100), ("storm", 5000), ("tokens", 4096)):
            check_int(self, name, 1, most)
        check_int(self, "seed", 0, 2**63 - 1)
        for name in ("seconds", "open_seconds"):
            if not 0 < getattr(self, name) <= 86_400:
                raise InvalidConfig(f"{name} must be a number above 0, up to 86400.", param=name)


# ---- clients that leave, in the clients' process ---------------------------------------------------------------------


def storm(target: Target, count: int, start: int, seed: int) -> list[Sample]:
    """`count` requests at once whose clients leave within half a second, whatever has come by then."""
    draw, began = random.Random(seed), time.perf_counter()

    async def one(number: int, stay_s: float) -> Sample:
        sample = await http_load.request(target, number, 0.0, began, stay_s)
        return sample._replace(status="left") if sample.status == "timeout" else sample

    async def go() -> list[Sample]:
        return list(await asyncio.gather(*(one(start + n, draw.uniform(0.0, 0.5)) for n in range(count))))

    return asyncio.run(go())


# ---- the server ------------------------------------------------------------------------------------------------------


class Lag:
    """How late an event loop wakes, in seconds: `now` since `start`, `loads` during all loads that `end` has ended."""

    def __init__(self) -> None:
        self.now: list[float] = []
        self.loads: list[float] = []

    def begin(self) -> None:
        """Within the loop."""
        self.loop = asyncio.get_running_loop()
        self._task = self.loop.create_task(self._probe())

    async def _probe(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_S
            await asyncio.sleep(LAG_S)
            self.now.append(loop.time() - due)

    def start(self) -> None:
        """A load begins. What went before it, such as a garbage collection for the invariants, does not count."""
        time.sleep(2 * LAG_S)
        self.now = []

    def end(self) -> dict[str, float]:
        """The load is over."""
        self.loads += self.now
        return lag_ms_of(self.now)


def lag_ms_of(seconds: list[float]) -> dict[str, float]:
    late = seconds or [0.0]
    figures = {"p50": statistics.median(late), "p99": percentile(late, 99), "max": max(late)}
    return {name: round(value * 1000, 2) for name, value in figures.items()}


# ---- the run ---------------------------------------------------------------------------------------------------------


def bench_load(engine: EngineConfig, config: LoadConfig) -> dict[str, Any]:
    """All loads, one after the other. Raises LoadError: the model cannot be had."""
    from medusa_serve.bench.facts import command, facts, rested
    from medusa_serve.bench.questions import read_prompts
    from medusa_serve.llm import LLM

    lag, key = Lag(), secrets.token_urlsafe()
    with rested(LLM(engine)) as llm, served(llm, key, lag.begin) as url, http_load.clients() as run:
        target = Target(url, read_prompts().questions, config.tokens, chat=llm.codec.has_chat_template, key=key)
        with closing(Invariants(llm, url, lag.loop, key)) as invariants:
            loads = list(_loads(run, target, config, invariants, lag))
        limits = llm.manager.limits()
        health = llm.describe()
    result = {
        "kind": "load",
        "rule": RULE.format(tokens=config.tokens),
        "machine": facts(),
        "command": command("tests.campaigns"),
        "engine": health | {"max_queue": limits["max_queue"]},
        "options": {name: getattr(config, name) for name in config.__dataclass_fields__},
        "loads": loads,
        "lag_ms": lag_ms_of(lag.loads),
    }
    return result | {"bars": bars(result)}


def _loads(
    run: Callable[..., list[Sample]], target: Target, config: LoadConfig, invariants: Invariants, lag: Lag
) -> Iterator[dict[str, Any]]:
    from medusa_serve.training.pipeline import ProgressLine

    line, start = ProgressLine(every_elsewhere=0.0), 0

    def load(name: str, facts: dict[str, Any], function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        nonlocal start
        line.show(f"{name} {' '.join(map(str, facts.values()))}")
        lag.start()
        began = time.monotonic()
        samples = run(function, target, *arguments)
        start += len(samples)
        took_s, lag_ms = round(time.monotonic() - began, 1), lag.end()
        seen = {"took_s": took_s, "lag_ms": lag_ms, "invariants": invariants.check(samples)}
        return {"load": name, **facts, **_counted(samples), **seen}

    burst = [n / config.burst for n in range(config.burst)]
    # as many connections as there will be: what they need once is there, from now on nothing may grow
    start += len(run(http_load.open_loop, target, burst, start))
    invariants.begin()
    closed = load(
        "closed", {"clients": config.clients}, http_load.closed_loop, config.clients, start, None, config.seconds
    )
    yield closed
    for share in SHARES:
        rate = max(0.01, share * closed["answers_per_second"])
        due = http_load.arrivals(rate, config.seed, None, config.open_seconds)
        yield load("open", {"share": share, "rate": round(rate, 3)}, http_load.open_loop, due, start)
    yield load("burst", {"requests_in_1_s": config.burst}, http_load.open_loop, burst, start)
    for number in range(config.storms):
        yield load("storm", {"number": number + 1}, storm, config.storm, start, config.seed + number)
    line.leave()


def _counted(samples: list[Sample]) -> dict[str, Any]:
    figures = summary(samples)
    refused = sum(sample.status in REFUSED for sample in samples)
    return {
        "requests": len(samples),
        "statuses": dict(sorted(Counter(sample.status for sample in samples).items())),
        "accepted_share": round(1 - refused / len(samples), 4),
        "answers_per_second": figures["requests_per_second"],
        "tokens_per_second": figures["tokens_per_second"],
        "first_token_ms": figures["first_token_ms"],
        "total_ms": figures["total_ms"],
    }


def bars(result: dict[str, Any]) -> dict[str, bool]:
    """What was asked for, and whether it was so."""
    loads = result["loads"]
    of = {kind: [one for one in loads if one["load"] == kind] for kind in ("closed", "open", "burst", "storm")}
    expected = {"closed": {"200"}, "open": {"200", *REFUSED}, "burst": {"200", *REFUSED}}
    expected["storm"] = {"200", "left", *REFUSED}
    below = [one for one in of["open"] if one["share"] < 1]
    return {
        "no unexpected status": all(set(one["statuses"]) <= expected[one["load"]] for one in loads),
        "below capacity nothing is refused": all(set(one["statuses"]) == {"200"} for one in below),
        "invariants hold after each load": all(one["invariants"]["held"] for one in loads),
        f"event loop lag p99 < {LAG_P99_MS:.0f} ms": result["lag_ms"]["p99"] < LAG_P99_MS,
    }


# ---- for a person ----------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    engine, facts = result["engine"], result["machine"]
    device = facts["cpu"] if engine.get("device") == "cpu" else facts["device"]
    lines = [
        f"{engine['model']} in {engine['dtype']}, {engine['heads']} heads, {engine['slots']} slots and a queue of "
        f"{engine['max_queue']}, {device}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}",
        f"{'':26}{'requests':>9}{'accepted':>10}{'answers/s':>11}{'first token ms: p50':>21}{'p99':>9}"
        f"{'lag ms: p99':>13}{'canary s':>10}  statuses",
    ]
    for one in result["loads"]:
        facts_of = {"closed": "{clients} clients", "open": "{share:g} × capacity", "burst": "{requests_in_1_s} in 1 s"}
        name = f"{one['load']}, " + facts_of.get(one["load"], "no. {number}").format(**one)
        first = one["first_token_ms"] or {"p50": float("nan"), "p99": float("nan")}
        statuses = ", ".join(f"{count} × {status}" for status, count in one["statuses"].items())
        lines.append(
            f"{name:26}{one['requests']:9}{one['accepted_share']:10.1%}{one['answers_per_second']:11.2f}"
            f"{first['p50']:21.0f}{first['p99']:9.0f}{one['lag_ms']['p99']:13.1f}"
            f"{one['invariants']['canary_s']:10.2f}  {statuses}"
        )
    lag = result["lag_ms"]
    lines.append(f"event loop lag over all loads: p50 {lag['p50']} ms, p99 {lag['p99']} ms, at most {lag['max']} ms")
    lines += [f"{'yes' if held else 'NO '}  {name}" for name, held in result["bars"].items()]
    return "\n".join(lines)


# ---- the command -----------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slots", type=int, metavar="N", help="sequences that decode together (default: from memory)")
    parser.add_argument("--clients", type=int, metavar="N", help="of the closed loop (64)")
    parser.add_argument("--seconds", type=float, metavar="T", help="of the closed loop (180)")
    parser.add_argument("--open-seconds", type=float, metavar="T", help="of each open loop (30)")
    parser.add_argument("--tokens", type=int, metavar="N", help="of an answer at most (24)")
    parser.add_argument("--seed", type=int, metavar="N", help="of all random times (0)")
    end_options(parser, run)


def run(options: argparse.Namespace) -> int:
    return run_bench(options, "load", LoadConfig, bench_load, table)
