"""Clients of POST /generate in one event loop: when each answer's tokens came. Standard library alone.

It runs in other processes (`clients`), which are ready before they are asked: clients that shared the interpreter
with the server would take the engine's time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import multiprocessing
import random
import ssl
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

MAX_LINE = 1 << 20  # bytes of a header, or of one event
ANSWER_S = 600.0  # an answer that takes longer is an error
PERCENTILES = (50, 95, 99)
NUMBERS_EACH = 1_000_000  # numbers of requests that each process of clients may use
PAUSE_S = 0.2  # that a client waits after a failed request: a refused one would spin


class Sample(NamedTuple):
    """One request, its answer read until the connection closed; times in seconds since the load began. due: when it was
    to be sent · first: its first token, None where none came · status: "200" for a whole answer; else the HTTP status,
    an error event's code, "cut" for a stream without an end, "unreachable" or "timeout" · terminals: events that end an
    answer, a completion or an error · dones: [DONE] lines"""

    due: float
    first: float | None
    end: float
    tokens: int
    status: str
    terminals: int = 0
    dones: int = 0

    @property
    def ok(self) -> bool:
        return self.status == "200"

    @property
    def accepted(self) -> bool:
        """The server began to answer: exactly one terminal event is due, and one [DONE]."""
        return self.terminals > 0 or self.dones > 0 or self.status in ("200", "cut")

    @property
    def ended_once(self) -> bool:
        return self.terminals == self.dones == 1


@dataclass(frozen=True)
class Target:
    """Where requests go and what each says: the texts in turn, each with its request's number before it, so that no two
    prompts are the same. chat: as a user's message, not as raw text"""

    url: str
    texts: Sequence[str]
    tokens: int
    chat: bool = True
    key: str | None = None

    def body(self, number: int) -> dict[str, Any]:
        text = f"{number}. {self.texts[number % len(self.texts)]}"
        source = {"messages": [{"role": "user", "content": text}]} if self.chat else {"prompt": text}
        return {**source, "max_tokens": self.tokens, "stream": True}


# ---- loads: each runs in the process of the clients and returns its samples ------------------------------------------


def closed_loop(target: Target, clients: int, start: int, requests: int | None, seconds: float) -> list[Sample]:
    """Each client sends its next request when its last one has ended: `requests` in all, or new ones for `seconds`.
    start: the first request's number."""
    return asyncio.run(_closed(target, clients, itertools.count(start), requests, seconds))


def open_loop(target: Target, due: Sequence[float], start: int) -> list[Sample]:
    """Requests at the times `due` (seconds), whether or not earlier ones have ended. Their times count from then."""
    return asyncio.run(_open(target, due, start))


def arrivals(rate: float, seed: int, requests: int | None, seconds: float) -> list[float]:
    """Times of a Poisson process of `rate` a second, the same for the same seed: `requests`, or those within `seconds`;
    at least one."""
    draw = random.Random(seed)
    times = itertools.accumulate(draw.expovariate(rate) for _ in itertools.count())
    if requests is not None:
        return list(itertools.islice(times, requests))
    first = next(times)
    return [first, *itertools.takewhile(lambda time: time < seconds, times)]


async def _closed(
    target: Target, clients: int, numbers: Iterator[int], requests: int | None, seconds: float
) -> list[Sample]:
    began, samples = time.perf_counter(), list[Sample]()
    left = itertools.count(1)

    async def client() -> None:
        while next(left) <= requests if requests is not None else time.perf_counter() - began < seconds:
            due = time.perf_counter() - began
            samples.append(await request(target, next(numbers), due, began))
            if not samples[-1].ok:
                await asyncio.sleep(PAUSE_S)

    await asyncio.gather(*(client() for _ in range(clients)))
    return samples


async def _open(target: Target, due: Sequence[float], start: int) -> list[Sample]:
    began = time.perf_counter()

    async def one(number: int, at: float) -> Sample:
        await asyncio.sleep(at - (time.perf_counter() - began))
        return await request(target, start + number, at, began)

    return list(await asyncio.gather(*(one(number, at) for number, at in enumerate(due))))


# ---- one request -----------------------------------------------------------------------------------------------------


async def request(target: Target, number: int, due: float, began: float, patience_s: float = ANSWER_S) -> Sample:
    """Send one and read its answer, for `patience_s` at most. began: the load, by perf_counter"""
    first, status, tokens, terminals, dones = None, "cut", 0, 0, 0
    try:
        async with asyncio.timeout(patience_s), aclosing(_events(target, target.body(number))) as events:
            async for event in events:
                if isinstance(event, str):  # the HTTP status of a refusal, or the end
                    dones += event == "200"
                    status = event if status == "cut" else status
                elif "error" in event:
                    status, terminals = str(event["error"]["code"] or event["error"]["type"]), terminals + 1
                else:
                    tokens, terminals = tokens + sum(event["tokens"]), terminals + ("finish_reason" in event)
                    if first is None and tokens:
                        first = time.perf_counter() - began
    except TimeoutError:
        status = "timeout"
    except OSError:
        if status == "cut" and not tokens:
            status = "unreachable"
    except (ValueError, LookupError, TypeError, EOFError):
        status = "cut"  # the stream ended within an event, or it is none of ours
    return Sample(due, first, time.perf_counter() - began, tokens, status, terminals, dones)


async def _events(target: Target, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any] | str]:
    """The events of one answer, "200" for its [DONE], and what comes after that; the status alone where it is
    another."""
    parts = urlsplit(target.url)
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if tls else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls, limit=MAX_LINE)
    try:
        writer.write(_head_and_body(parts.netloc, parts.path.rstrip("/") + "/generate", target.key, body))
        await writer.drain()
        status, chunked = await _answer_head(reader)
        if status != "200":
            yield status
            return
        async for event in _split(_pieces(reader, chunked)):
            yield status if event == b"[DONE]" else json.loads(event)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _head_and_body(host: str, path: str, key: str | None, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", "Connection: close"]
    lines += [f"Content-Length: {len(data)}", *([] if key is None else [f"Authorization: Bearer {key}"]), "", ""]
    return "\r\n".join(lines).encode() + data


async def _answer_head(reader: asyncio.StreamReader) -> tuple[str, bool]:
    """(status, whether the body comes in chunks)."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    first, _, rest = head.partition("\r\n")
    return first.split(" ")[1], "transfer-encoding: chunked" in rest


async def _pieces(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """The body as it comes."""
    if not chunked:
        while piece := await reader.read(MAX_LINE):
            yield piece
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _split(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What the server-sent events say; comments, by which a silent server shows that it lives, say nothing."""
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n\n")
        for event in whole:
            if not event.startswith(b":"):
                yield event.removeprefix(b"data: ")


# ---- figures ---------------------------------------------------------------------------------------------------------


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Counts, rates and percentiles of a load; None where there is nothing to take them from."""
    whole = [sample for sample in samples if sample.ok and sample.first is not None]
    seconds = max(s.end for s in samples) - min(s.due for s in samples)
    tokens = sum(sample.tokens for sample in samples)
    return {
        "requests": len(samples),
        "whole": len(whole),
        "errors": dict(sorted(Counter(s.status for s in samples if not s.ok).items())),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "requests_per_second": round(len(whole) / seconds, 3),
        "first_token_ms": percentiles([s.first - s.due for s in whole if s.first is not None]),
        "token_ms": percentiles([(s.end - s.first) / (s.tokens - 1) for s in whole if s.first and s.tokens > 1]),
        "total_ms": percentiles([s.end - s.due for s in whole]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99 in milliseconds."""
    if not seconds:
        return None
    return {f"p{share}": round(percentile(seconds, share) * 1000, 3) for share in PERCENTILES}


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` per cent lie below; between two of them on the straight line, as numpy does."""
    ordered = sorted(values)
    index = (len(ordered) - 1) * share / 100
    low, high = math.floor(index), math.ceil(index)
    return ordered[low] + (ordered[high] - ordered[low]) * (index - low)


# ---- the processes ---------------------------------------------------------------------------------------------------


@contextmanager
def clients(processes: int = 1) -> Iterator[Callable[..., list[Sample]]]:
    """A call that runs a load (closed_loop, open_loop) with its arguments in a process of the clients; a closed loop
    for a time is shared out among `processes`, since one reads a limited number of events a second."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(time.sleep, [0.5] * processes))  # all are there, none of them took two of these

        def run(load: Callable[..., list[Sample]], *arguments: Any) -> list[Sample]:
            split = load is closed_loop and arguments[3] is None
            parts = shared(*arguments, processes=processes) if split else [arguments]
            futures = [pool.submit(load, *part) for part in parts]
            return [sample for future in futures for sample in future.result()]

        yield run


def shared(
    target: Target, clients: int, start: int, requests: None, seconds: float, *, processes: int
) -> list[tuple[Target, int, int, None, float]]:
    """A closed loop's arguments for each process that gets a client; each numbers its requests from another start,
    so that no two prompts are the same."""
    counts = [clients // processes + (index < clients % processes) for index in range(processes)]
    firsts = [start + index * NUMBERS_EACH for index in range(processes)]
    return [(target, n, first, requests, seconds) for n, first in zip(counts, firsts, strict=True) if n]
