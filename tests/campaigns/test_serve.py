"""`python -m tests.campaigns serve`: figures of known samples, clients of a scripted server, the command end to end."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy
import pytest

from medusa_serve.config import EngineConfig
from medusa_serve.errors import GenerationFailed, InvalidConfig, LoadError, QueueFull
from medusa_serve.server.config import ServerConfig
from medusa_serve.types import Delta
from tests.campaigns import __main__ as campaigns
from tests.campaigns import serve
from tests.campaigns.http_load import (
    NUMBERS_EACH,
    Sample,
    Target,
    arrivals,
    clients,
    closed_loop,
    open_loop,
    percentile,
    shared,
    summary,
)
from tests.campaigns.serve import ServeConfig, bench_serve, table
from tests.server.standins import HandLLM, HandManager, hello, serving
from tests.tiny import save_tiny_folder


def run(*arguments: str) -> int:
    try:
        return campaigns.main(["serve", *arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_percentiles_of_known_lists() -> None:
    assert [percentile([40, 10, 30, 20, 50], share) for share in (0, 50, 75, 95, 100)] == [10, 30, 40, 48, 50]
    assert percentile([7.0], 99) == 7.0
    values = [random.Random(1).uniform(0, 9) for _ in range(101)]
    for share in (50, 95, 99):
        assert percentile(values, share) == pytest.approx(numpy.percentile(values, share))


def test_summary_of_known_samples() -> None:
    samples = [
        Sample(due=1.0, first=1.5, end=2.5, tokens=11, status="200"),
        Sample(due=1.0, first=2.0, end=5.0, tokens=4, status="200"),
        Sample(due=2.0, first=None, end=2.25, tokens=0, status="429"),
        Sample(due=3.0, first=3.5, end=3.75, tokens=5, status="cut"),
        Sample(due=3.0, first=None, end=3.0, tokens=0, status="429"),
    ]
    assert summary(samples) == {
        "requests": 5,
        "whole": 2,
        "errors": {"429": 2, "cut": 1},
        "tokens": 20,
        "seconds": 4.0,
        "tokens_per_second": 5.0,
        "requests_per_second": 0.5,
        "first_token_ms": {"p50": 750.0, "p95": 975.0, "p99": 995.0},
        "token_ms": {"p50": 550.0, "p95": 955.0, "p99": 991.0},
        "total_ms": {"p50": 2750.0, "p95": 3875.0, "p99": 3975.0},
    }
    refused = summary(samples[2:3])
    assert (refused["first_token_ms"], refused["token_ms"], refused["tokens_per_second"]) == (None, None, 0.0)


def test_arrival_times_of_a_known_seed() -> None:
    draw = random.Random(7)
    expected = list(itertools.accumulate(draw.expovariate(20.0) for _ in range(4000)))
    assert arrivals(20.0, 7, 4000, 1.0) == expected
    assert [round(time, 4) for time in expected[:3]] == [0.0196, 0.0277, 0.0804]
    assert expected[-1] == pytest.approx(200, rel=0.05)  # the rate
    assert arrivals(20.0, 7, None, 10.0) == [time for time in expected if time < 10.0]
    assert arrivals(20.0, 8, 3, 1.0) != expected[:3]
    assert len(arrivals(0.001, 7, None, 0.5)) == 1  # at least one


# ---- clients ---------------------------------------------------------------------------------------------------------


class Scripted(ThreadingHTTPServer):
    """Answers after `delay` with `reply(number)`: pieces of a chunked body, or a status; counts who is here at once."""

    daemon_threads = True

    def __init__(self, reply: Any, delay: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.delay = reply, delay
        self.lock, self.open, self.most = threading.Lock(), 0, 0
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str | None] = set()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.open += 1
            server.most = max(server.most, server.open)
            server.bodies.append(body)
            server.times.append(time.perf_counter())
            server.keys.add(self.headers["Authorization"])
        time.sleep(server.delay)
        with server.lock:
            server.open -= 1
        reply = server.reply(int(body["messages"][0]["content"].split(".")[0]))
        if isinstance(reply, int):
            self.send_response(reply)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in reply:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.close_connection = True

    def log_message(self, *args: Any) -> None: ...


STEP, END = b'data: {"text":"a","tokens":[1,2],"accepted":[0,1]}\n\n', b"data: [DONE]\n\n"
LAST = b'data: {"text":"","tokens":[2],"accepted":[1],"usage":{"completion_tokens":5}}\n\n'


def whole(number: int) -> list[bytes]:
    """An answer of five tokens, cut anywhere."""
    data = STEP + LAST + END
    cut = 1 + number * 7 % (len(data) - 2)
    return [data[:cut], data[cut:], b""]


@contextmanager
def scripted(reply: Any, delay: float = 0.0) -> Iterator[tuple[Scripted, Target]]:
    with Scripted(reply, delay) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server, Target(f"http://127.0.0.1:{server.server_port}/", ["Why?", "How?"], 9, key="k")
        finally:
            server.shutdown()
            thread.join()


def test_a_closed_loop_sends_each_request_once_and_never_more_than_its_clients() -> None:
    with scripted(whole, delay=0.01) as (server, target):
        samples = closed_loop(target, 3, 5, 12, 0.0)
    assert [(s.status, s.tokens) for s in samples] == [("200", 5)] * 12
    assert server.most == 3
    assert server.keys == {"Bearer k"}
    texts = sorted(body["messages"][0]["content"] for body in server.bodies)
    assert texts == sorted(f"{n}. {'How?' if n % 2 else 'Why?'}" for n in range(5, 17))
    assert all((body["max_tokens"], body["stream"]) == (9, True) for body in server.bodies)
    assert all(s.due < s.first < s.end for s in samples if s.first)
    assert all(s.first - s.due >= 0.01 for s in samples if s.first)


def test_a_closed_loop_ends_with_its_seconds_and_an_open_answer_is_waited_for() -> None:
    with scripted(whole, delay=0.1) as (_, target):
        samples = closed_loop(target, 2, 0, None, 0.15)
    assert len(samples) == 4
    assert all(s.ok and s.due < 0.15 for s in samples)
    assert max(s.end for s in samples) >= 0.2


def test_clients_are_shared_out_among_processes_and_no_two_prompts_are_the_same() -> None:
    with scripted(whole, delay=0.1) as (server, target), clients(processes=2) as load:
        samples = load(closed_loop, target, 3, 5, None, 0.35)
        rest = load(closed_loop, target, 3, 0, 2, 0.0)
    assert server.most == 3
    assert len(rest) == 2
    texts = [body["messages"][0]["content"] for body in server.bodies]
    assert len(texts) == len(set(texts)) == len(samples) + 2
    assert {int(text.partition(".")[0]) // NUMBERS_EACH for text in texts} == {0, 1}
    assert [part[1:3] for part in shared(target, 3, 5, None, 1.0, processes=4)] == [
        (1, 5),
        (1, 5 + NUMBERS_EACH),
        (1, 5 + 2 * NUMBERS_EACH),
    ]


def test_an_open_loop_does_not_wait_for_the_server() -> None:
    due = [0.0, 0.05, 0.1]
    with scripted(whole, delay=0.3) as (server, target):
        began = time.perf_counter()
        samples = open_loop(target, due, 0)
    assert server.most == 3
    assert [s.due for s in samples] == due
    for at, came in zip(due, sorted(server.times), strict=True):
        assert at <= came - began < at + 0.25
    assert all(s.first - s.due >= 0.29 for s in samples if s.first)


def test_errors_are_counted_by_what_they_are() -> None:
    error = b'data: {"error":{"message":"No.","type":"server_error","param":null,"code":"generation_failed"}}\n\n'
    replies = {
        0: whole(0),
        1: 429,
        2: 429,
        3: [STEP],  # the connection closes within the chunked body
        4: [STEP, b""],  # a whole body without [DONE]
        5: [STEP, error + END, b""],
        6: [b"data: no JSON\n\n", END, b""],
        7: 503,
    }
    with scripted(replies.__getitem__) as (_, target):
        samples = closed_loop(target, 8, 0, 8, 0.0)
    told = summary(samples)
    assert told["errors"] == {"429": 2, "503": 1, "cut": 3, "generation_failed": 1}
    assert (told["requests"], told["whole"], told["tokens"]) == (8, 1, 5 + 3 + 3 + 3)
    gone = closed_loop(target, 1, 0, 1, 0.0)  # nobody listens there now
    assert [(s.status, s.tokens, s.first) for s in gone] == [("unreachable", 0, None)]


def test_a_refused_client_does_not_spin() -> None:
    with scripted(lambda number: 429) as (_, target):
        assert 2 <= len(closed_loop(target, 2, 0, None, 0.3)) <= 4


def test_the_real_server_speaks_what_the_clients_read() -> None:
    def failing(name: str, ids: list[int], params: Any) -> list[Delta]:
        return [hello(name, ids, params)[0], Delta("", error=GenerationFailed("It failed."))]

    for manager, status, tokens in (
        (HandManager(), "200", 6),
        (HandManager(failing), "generation_failed", 1),
        (HandManager(error=QueueFull("Full.")), "429", 0),
    ):
        with serving(HandLLM(manager)) as url:
            [sample] = closed_loop(Target(url, ["Hi"], 9), 1, 0, 1, 0.0)
        assert (sample.status, sample.tokens) == (status, tokens)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_folder(tmp_path_factory.mktemp("base") / "tiny"))


def test_a_server_of_its_own(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "serve.json"
    loads = ("--clients", "2", "--rate", "40", "--requests", "5", "--tokens", "7", "--rounds", "1")
    assert run("--model", folder, "--device", "cpu", "--slots", "3", *loads, "--out", str(out)) == 0
    result = json.loads(out.read_text())
    assert [load["loop"] for load in result["loads"]] == ["closed", "open"]
    for load in result["loads"]:
        assert (load["requests"], load["whole"], load["errors"]) == (5, 5, {})
        assert 5 <= load["tokens"] <= 35
        assert load["tokens_per_second"] == pytest.approx(load["tokens"] / load["seconds"], 0.01)
        assert 0 < load["first_token_ms"]["p50"] <= load["first_token_ms"]["p99"] <= load["total_ms"]["p99"]
    assert result["loads"][1]["seconds"] >= arrivals(40, 0, 5, 0)[-1] - arrivals(40, 0, 5, 0)[0]
    [compared] = result["http_over_engine"]
    assert compared["clients"] == 2
    assert compared["tokens"][0] == compared["tokens"][1] > 0  # the same answers
    rates = compared["http_tokens_per_second"], compared["engine_tokens_per_second"]
    assert compared["ratio"] == pytest.approx(rates[0] / rates[1], 0.01)
    assert (result["engine"]["slots"], result["engine"]["dtype"], result["url"]) == (3, "float32", None)
    shown = capsys.readouterr().out
    assert "closed loop, clients: 2" in shown
    assert "HTTP over the engine alone, 2 at a time" in shown


def test_a_server_that_runs_already(capsys: pytest.CaptureFixture[str]) -> None:
    llm = HandLLM()
    with serving(llm, ServerConfig(port=0, api_key="secret")) as url:
        config = ServeConfig(url=url, key="secret", clients=(2,), requests=4, tokens=9)
        result = bench_serve(EngineConfig(), config)
        with pytest.raises(LoadError, match="401"):
            bench_serve(EngineConfig(), ServeConfig(url=url, clients=(1,), requests=1))
    [load] = result["loads"]
    assert (load["whole"], load["tokens"], load["errors"]) == (4, 24, {})
    assert (result["http_over_engine"], result["engine"]["model"]) == ([], "stand-in")
    assert "secret" not in json.dumps(result)
    assert "left out" in table(result)
    assert run("--url", url) == 1  # it has stopped
    assert "No server is ready" in capsys.readouterr().err


def test_a_model_without_a_chat_template_gets_raw_text(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path / "bare", chat_template=None)
    config = ServeConfig(clients=(1,), requests=1, tokens=4, rounds=1)
    result = bench_serve(EngineConfig(model=str(folder), device="cpu"), config)
    assert (result["loads"][0]["whole"], result["loads"][0]["errors"]) == (1, {})


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("url", {"url": "localhost:8000"}),
        ("clients", {"clients": (0,)}),
        ("clients", {"clients": (2, 2)}),
        ("clients", {"clients": ()}),
        ("rates", {"rates": (0.0,)}),
        ("rates", {"rates": (float("nan"),)}),
        ("seconds", {"seconds": 0.0}),
        ("requests", {"requests": 3, "clients": (4,)}),  # fewer than clients
        ("tokens", {"tokens": 1}),
        ("rounds", {"rounds": 0}),
        ("seed", {"seed": -1}),
    ],
)
def test_nonsense_is_refused(field: str, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig) as caught:
        ServeConfig(**given)
    assert caught.value.param == field


def test_nonsense_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in (
        (("--rate", "0"), "rates must be"),
        (("--clients", "x"), "--clients"),
        (("--requests", "2", "--seconds", "3"), "not allowed with"),
        (("--slots", "0"), "slots must be"),
    ):
        assert run(*arguments) == 2
        assert says in capsys.readouterr().err


def test_rates_alone_leave_closed_loops_out(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ServeConfig] = []

    def stop(engine: EngineConfig, config: ServeConfig) -> Any:
        given.append(config)
        raise LoadError("enough")

    monkeypatch.setattr(serve, "bench_serve", stop)
    monkeypatch.setenv("MEDUSA_SERVE_API_KEY", "mine")
    assert run("--rate", "3,5") == run("--url", "http://x", "--clients", "2") == 1
    assert [(c.clients, c.rates, c.key) for c in given] == [((), (3.0, 5.0), None), ((2,), (), "mine")]
