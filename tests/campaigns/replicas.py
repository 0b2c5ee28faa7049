"""Copies of the model at one address, under Ray Serve: `python -m tests.campaigns replicas`.

scaling  closed loops of streaming clients against one replica, then against all, in one run
kill     one replica is killed (SIGKILL) under load: how each request ended, and when the replica was back
update   the replicas are brought to another config under load, one after the other
split    a model over all GPUs, layer by layer: its greedy tokens beside those of one GPU
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from medusa_serve.bench.command import end_options, numbers, run_bench, write
from medusa_serve.cluster.config import ReplicasConfig
from medusa_serve.config import DEFAULT_MODEL, EngineConfig, check_int
from medusa_serve.errors import InvalidConfig
from medusa_serve.server.config import ServerConfig
from medusa_serve.types import SamplingParams

from . import http_load
from .http_load import Sample, Target, summary
from .shapes import SHAPES, random_llm

if TYPE_CHECKING:
    from medusa_serve.cluster.command import Cluster

Row = dict[str, Any]
RunLoad = Callable[..., list[Any]]
PARTS = ("scaling", "kill", "update", "split")
RULE = (
    "Greedy streamed answers of at most {tokens} tokens, through one address; clients in {processes} other processes, "
    "each of which sends its next request when its last one has ended, for {seconds:g} s. scaling: "
    "tokens_per_second, percentiles of whole answers; ratios: all replicas over one, with the same clients in all, and "
    "with the same clients for each replica. kill, update: each stream is read to its end; "
    "terminals: events that end an answer (a completion or an error), of which each accepted request must have one; "
    "lost: requests without a whole answer. split: {split_tokens} greedy tokens of a model over all GPUs and on one."
)
SPLIT_PROMPTS, SPLIT_TOKENS = 4, 64
BACK_S = 150.0  # a replica that needs longer to come back is reported as lost


@dataclass(frozen=True, kw_only=True)
class ReplicasBenchConfig:
    """replicas: copies · clients: streaming clients, closed loops · processes: that these are shared out among ·
    seconds: of each load · tokens: of an answer · random: a key of SHAPES, built of random weights · parts: what is
    measured"""

    replicas: int = 2
    clients: tuple[int, ...] = (16, 64)
    processes: int = 1
    seconds: float = 10.0
    tokens: int = 96
    random: str | None = None
    parts: tuple[str, ...] = ("scaling", "kill", "update")

    def __post_init__(self) -> None:
        check_int(self, "replicas", 2, 64)
        check_int(self, "processes", 1, 64)
        check_int(self, "tokens", 2, 2**20)
        if not self.clients or not all(1 <= count <= 1024 for count in self.clients):
            raise InvalidConfig("clients must be numbers from 1 to 1024.", param="clients")
        if not 0 < self.seconds <= 3600:
            raise InvalidConfig("seconds must be a number above 0, up to 3600.", param="seconds")
        if not self.parts or set(self.parts) - set(PARTS):
            raise InvalidConfig(f"parts must be some of {', '.join(PARTS)}.", param="parts")
        if self.random is not None and self.random not in SHAPES:
            raise InvalidConfig(f"random must be one of {', '.join(SHAPES)}, not {self.random!r}.", param="random")


# ---- the run -----------------------------------------------------------------------------------------------------


def bench_replicas(engine: EngineConfig, config: ReplicasBenchConfig, keep: Callable[[Row], None]) -> Row:
    """All parts asked for. keep: is given what was found so far, after each load and part. Raises LoadError."""
    from medusa_serve.bench.facts import command, facts

    # a closed loop is never refused
    engine = replace(engine, max_queue=max((engine.max_queue, *config.clients)))
    names = ("replicas", "clients", "processes", "seconds", "tokens", "random", "parts")
    result = {
        "kind": "replicas",
        "rule": RULE.format(split_tokens=SPLIT_TOKENS, **{name: getattr(config, name) for name in names}),
        "machine": facts(),
        "command": command("tests.campaigns"),
        "options": {name: getattr(config, name) for name in names},
    }

    def add(found: Row) -> None:
        result.update(found)
        keep(result)

    if set(config.parts) - {"split"}:
        _under_ray(engine, config, add)
    if "split" in config.parts:
        add({"split": split_text(engine, config.random)})
    return result


def _under_ray(engine: EngineConfig, config: ReplicasBenchConfig, add: Callable[[Row], None]) -> None:
    from medusa_serve.bench.questions import read_prompts
    from medusa_serve.cluster.command import cluster
    from medusa_serve.training.pipeline import ProgressLine

    load = partial(random_llm, shape=config.random) if config.random else None
    line, start = ProgressLine(every_elsewhere=0.0), 0
    patient = ServerConfig(port=0, queue_s=3600, first_token_s=3600, total_s=3600)
    with cluster(patient) as running, http_load.clients(config.processes) as run:
        shares = running.shares(config.replicas, engine)
        chat = config.random is None and engine.model == DEFAULT_MODEL
        target = Target(running.url, read_prompts().questions, config.tokens, chat=chat)
        loads: dict[int, list[Row]] = {}
        counts = (1, config.replicas) if "scaling" in config.parts else (config.replicas,)
        for count in counts:
            line.show(f"{count} replicas start")
            running.deploy(engine, ReplicasConfig(replicas=count, **shares), load)
            if "scaling" not in config.parts:
                continue
            warmed = run(http_load.closed_loop, target, max(config.clients), start, None, config.seconds)
            start += len(warmed)
            loads[count] = []
            add({"engine": running.about_replica()["model"]})
            for clients in config.clients:
                line.show(f"{count} replicas, clients: {clients}")
                samples = run(http_load.closed_loop, target, clients, start, None, config.seconds)
                start += len(samples)
                loads[count].append({"replicas": count, "clients": clients} | summary(samples))
                add({"loads": [row for rows in loads.values() for row in rows]})
        add({"engine": running.about_replica()["model"]} | ({"ratios": ratios(loads)} if loads else {}))

        def update() -> None:  # another chunk of prefill: a replica with another config is another replica
            changed = replace(engine, prefill_chunk=engine.prefill_chunk // 2)
            running.deploy(changed, ReplicasConfig(replicas=config.replicas, **shares), load)

        for part, act in (("kill", partial(kill_one, running)), ("update", update)):
            if part in config.parts:
                line.show(part)
                trouble = Trouble(running, run, target, config, start)
                add({part: trouble.during(act)})
                start = trouble.start
    line.leave()


def ratios(loads: dict[int, list[Row]]) -> list[Row]:
    """tokens/s of the many over one, for each number of clients: with as many clients in all, and, where that was
    measured, with as many clients for each replica."""
    one, many = min(loads), max(loads)
    rate = {count: {row["clients"]: row["tokens_per_second"] for row in loads[count]} for count in (one, many)}
    found = []
    for clients, alone in rate[one].items():
        each = rate[many].get(clients * many // one)
        row = {"clients": clients, "tokens_per_second": round(rate[many][clients] / alone, 3)}
        found.append(row | ({"each": round(each / alone, 3)} if each else {}))
    return found


# ---- trouble under load ------------------------------------------------------------------------------------------


class Trouble:
    """Clients that load the replicas while something happens to these, and somebody who watches /health."""

    def __init__(self, running: Cluster, run: RunLoad, target: Target, config: ReplicasBenchConfig, start: int) -> None:
        self.running, self.config, self.start = running, config, start
        self.streams: list[Sample] = []
        self.health: list[Row] = []
        self.began = time.perf_counter()
        self._run, self._target, self._stop = run, target, threading.Event()

    def during(self, act: Callable[[], None]) -> Row:
        """Load, `act` in the middle of it, load on until all are back. → how requests ended, what /health said"""
        threads = [threading.Thread(target=work) for work in (self._load, self._watch)]
        for thread in threads:
            thread.start()
        took = None
        try:
            time.sleep(self.config.seconds / 2)
            acted, before = time.perf_counter(), len(self.health)
            act()
            if self._all_back(before):
                took = round(time.perf_counter() - acted, 1)
            time.sleep(self.config.seconds / 2)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        times = {"acted_at_s": round(acted - self.began, 1), "all_back_after_s": took, "health": changes(self.health)}
        return {"clients": max(self.config.clients), **count(self.streams), **times}

    def _load(self) -> None:
        while not self._stop.is_set():
            new = self._run(http_load.closed_loop, self._target, max(self.config.clients), self.start, None, 4.0)
            self.start += len(new)
            self.streams += new

    def _watch(self) -> None:
        while not self._stop.is_set():
            at = round(time.perf_counter() - self.began, 1)
            self.health.append({"at_s": at, **read_health(self.running.url)})
            time.sleep(0.2)

    def _all_back(self, before: int) -> bool:
        """Whether as many as are wanted run again, after fewer did. before: how much was heard of /health then"""
        until = time.perf_counter() + BACK_S
        while time.perf_counter() < until:
            since = [seen["running"] for seen in self.health[before:]]
            if since and min(since) < self.config.replicas <= since[-1]:
                return True
            time.sleep(0.1)
        return False


def kill_one(running: Cluster) -> None:
    """SIGKILL to the process of one replica on this machine."""
    os.kill(running.about_replica()["pid"], signal.SIGKILL)


def read_health(url: str) -> Row:
    """The status code of GET /health and how many replicas run by its word; code 0 where nothing answers."""
    code, body = 0, {}
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=15) as response:
            code, body = response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        code = error.code
        with contextlib.suppress(OSError, ValueError):  # Ray's own answer, while there is no application
            body = json.loads(error.read())
    except (OSError, ValueError, HTTPException):
        pass
    return {"code": code, "running": body.get("replicas", {}).get("running", 0)}


def changes(health: list[Row]) -> list[Row]:
    """The first of each run of equal states."""
    states = [{name: seen[name] for name in ("code", "running")} for seen in health]
    return [seen for seen, state, before in zip(health, states, [None, *states], strict=False) if state != before]


def count(streams: list[Sample]) -> Row:
    accepted = [stream for stream in streams if stream.accepted]
    return {
        "requests": len(streams),
        "accepted": len(accepted),
        "whole": sum(stream.status == "200" for stream in streams),
        "lost": dict(sorted(Counter(stream.status for stream in streams if stream.status != "200").items())),
        "one_terminal": sum(stream.ended_once for stream in accepted),
    }


# ---- one model over all GPUs -------------------------------------------------------------------------------------


def split_text(engine: EngineConfig, random: str | None) -> Row:
    """The same greedy tokens from a model on one GPU and over all of them, both with the eager step."""
    from medusa_serve.bench.facts import rested
    from medusa_serve.bench.questions import read_prompts
    from medusa_serve.llm import LLM

    texts = read_prompts().questions[:SPLIT_PROMPTS]
    found: dict[str, Row] = {}
    for device in ("cuda:0", "split"):
        here = replace(engine, device=device, slots=SPLIT_PROMPTS, max_context=1024)
        with rested(random_llm(here, random) if random else LLM(here)) as llm:
            params = SamplingParams(max_tokens=SPLIT_TOKENS, ignore_eos=True)
            prompts: list[Any] = list(texts)
            llm.generate(prompts[:1], params)
            began = time.perf_counter()
            answers = llm.generate(prompts, params)
            took = time.perf_counter() - began
            found[device] = {
                "ids": [list(answer.token_ids) for answer in answers],
                "tokens_per_second": round(sum(answer.completion_tokens for answer in answers) / took, 1),
                "dtype": llm.dtype,
                "notes": [note for note in llm.notes if "GPU" in note],
            }
    one, split = (found[device].pop("ids") for device in ("cuda:0", "split"))
    same = [sum(1 for _ in _common(a, b)) for a, b in zip(one, split, strict=True)]
    return {"same": one == split, "tokens": SPLIT_TOKENS, "same_tokens": same, **found}


def _common(a: list[int], b: list[int]) -> Iterator[int]:
    return (x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


# ---- for a person ------------------------------------------------------------------------------------------------


def table(result: Row) -> str:
    facts, engine = result["machine"], result.get("engine", {})
    device = facts["cpu"] if engine.get("device") == "cpu" else facts["device"]
    name = f"{engine['model']} in {engine['dtype']}, {engine['slots']} slots a replica, " if engine else ""
    lines = [f"{name}{result['options']['replicas']} replicas on {device}, torch {facts['torch']}, {facts['date']}"]
    if "loads" in result:
        lines.append(
            f"{'replicas':>8}{'clients':>9}{'answers':>9}{'tokens/s':>11}{'first token ms: p50':>22}{'p95':>9}  errors"
        )
    for row in result.get("loads", []):
        first = row["first_token_ms"] or {}
        cells = f"{first.get('p50', float('nan')):22.1f}{first.get('p95', float('nan')):9.1f}"
        errors = ", ".join(f"{n} × {status}" for status, n in row["errors"].items()) or "none"
        lines.append(
            f"{row['replicas']:8}{row['clients']:9}{row['whole']:9}{row['tokens_per_second']:11.1f}{cells}  {errors}"
        )
    for row in result.get("ratios", []):
        each = f"; {row['clients']} for each replica: {row['each']:.2f}x" if "each" in row else ""
        lines.append(f"all replicas over one, {row['clients']} clients: {row['tokens_per_second']:.2f}x{each}")
    for part in ("kill", "update"):
        if part in result:
            lines.append(_trouble_line(part, result[part]))
    if "split" in result:
        split = result["split"]
        word = "the same" if split["same"] else f"the same up to {split['same_tokens']}"
        lines.append(f"split over all GPUs: {word} of {split['tokens']} greedy tokens as on one")
    return "\n".join(lines)


def _trouble_line(part: str, row: Row) -> str:
    lost = ", ".join(f"{n} × {status}" for status, n in row["lost"].items()) or "none"
    seen = " → ".join(f"{state['running']}" for state in row["health"])
    back = "never" if row["all_back_after_s"] is None else f"after {row['all_back_after_s']} s"
    ends = f"{row['one_terminal']} of {row['accepted']} accepted requests with one terminal event"
    return f"{part}: {row['requests']} requests, lost {lost}; {ends}; all back {back}; replicas by /health: {seen}"


# ---- the command -------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slots", type=int, metavar="N", help="of each replica (default: from memory)")
    parser.add_argument("--max-context", type=int, metavar="N", help="tokens of a slot")
    parser.add_argument("--replicas", type=int, metavar="N", help="copies of the model (2)")
    parser.add_argument("--clients", type=numbers(int), metavar="N,…", help="closed loops of streams (16,64)")
    parser.add_argument("--processes", type=int, metavar="N", help="that the clients are shared out among (1)")
    parser.add_argument("--seconds", type=float, metavar="T", help="of each load (10)")
    parser.add_argument("--tokens", type=int, metavar="N", help="of an answer at most (96)")
    parser.add_argument("--random", metavar="SHAPE", help=f"random weights instead of a model: {', '.join(SHAPES)}")
    about = f"some of {','.join(PARTS)} (scaling,kill,update)"
    parser.add_argument("--parts", type=lambda text: tuple(text.split(",")), metavar="P,…", help=about)
    end_options(parser, run)


def run(options: argparse.Namespace) -> int:
    def keep(result: Row) -> None:  # minutes of a machine's time are not thrown away
        if options.out:
            write(options.out, result)

    return run_bench(options, "replicas", ReplicasBenchConfig, partial(bench_replicas, keep=keep), table)
