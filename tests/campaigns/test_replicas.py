"""What `tests.campaigns replicas` makes of answers; the run itself is in tests/cluster/test_command.py (`-m ray`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from medusa_serve.config import EngineConfig
from medusa_serve.errors import GenerationFailed, InvalidConfig
from medusa_serve.types import Delta, SamplingParams
from tests.campaigns.http_load import Sample, Target, _split, closed_loop
from tests.campaigns.replicas import ReplicasBenchConfig, changes, count, ratios, table
from tests.campaigns.shapes import ByteCodec, random_llm
from tests.server.standins import HandLLM, HandManager, hello, serving


def test_streams_are_read_to_their_end_and_ends_are_counted() -> None:
    def script(name: str, ids: list[int], params: SamplingParams) -> list[Delta]:
        if chr(ids[0]) == "1":  # the second request
            return [Delta("H", (1,), (0,), (72,)), Delta("", error=GenerationFailed("no"))]
        return hello(name, ids, params)

    with serving(HandLLM(HandManager(script))) as url:
        samples = closed_loop(Target(url, ["x"], 8), 1, 0, 2, 0.0)
    assert [sample[3:] for sample in samples] == [(6, "200", 1, 1), (1, "generation_failed", 1, 1)]


def test_comments_of_a_silent_server_are_no_events() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b": still "
        yield b'here\n\ndata: {"text": "a"}\n\n: again\n\ndata: [DONE]\n\n'

    async def run() -> list[bytes]:
        return [event async for event in _split(pieces())]

    assert asyncio.run(run()) == [b'{"text": "a"}', b"[DONE]"]


def test_requests_without_exactly_one_end_are_seen() -> None:
    streams = [
        Sample(0.0, 1.0, 2.0, *told)
        for told in (
            (6, "200", 1, 1),
            (6, "200", 2, 1),  # ended twice
            (3, "cut", 0, 0),  # never ended
            (3, "generation_failed", 1, 1),
            (0, "queue_full", 0, 0),
            (0, "429", 0, 0),  # refused: nothing is due
        )
    ]
    told = count(streams)
    assert (told["requests"], told["accepted"], told["one_terminal"], told["whole"]) == (6, 4, 2, 2)
    assert told["lost"] == {"429": 1, "cut": 1, "generation_failed": 1, "queue_full": 1}


def test_health_is_told_once_a_change_and_ratios_go_by_clients() -> None:
    words = [(200, 2), (200, 2), (200, 1), (503, 0), (200, 2)]
    health = [{"at_s": float(at), "code": code, "running": n} for at, (code, n) in enumerate(words)]
    assert [told["at_s"] for told in changes(health)] == [0.0, 2.0, 3.0, 4.0]
    loads = {n: [{"clients": c, "tokens_per_second": n * 10.0 + c} for c in (1, 2)] for n in (1, 2)}
    assert ratios(loads) == [
        {"clients": 1, "tokens_per_second": round(21 / 11, 3), "each": 2.0},
        {"clients": 2, "tokens_per_second": round(22 / 12, 3)},
    ]


def test_a_random_model_speaks_letters() -> None:
    codec = ByteCodec()
    assert codec.decode(codec.encode("ab")) == "tu"
    with random_llm(EngineConfig(slots=1, dtype="float32", device="cpu", tree="off"), "tiny") as llm:
        [answer] = llm.generate("Hello", SamplingParams(max_tokens=5))
    assert (answer.completion_tokens, len(answer.text), llm.heads_name) == (5, 5, "none")


NONSENSE = [{"replicas": 1}, {"clients": ()}, {"processes": 0}, {"seconds": 0}, {"parts": ("x",)}, {"random": "x"}]


@pytest.mark.parametrize("given", NONSENSE)
def test_nonsense_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(InvalidConfig) as refused:
        ReplicasBenchConfig(**given)
    assert refused.value.param == next(iter(given))


def test_the_table_says_what_was_lost() -> None:
    told = {"requests": 3, "accepted": 3, "whole": 2, "lost": {"cut": 1}, "one_terminal": 2, "all_back_after_s": None}
    result = {
        "machine": {"cpu": "a CPU", "device": "a GPU", "torch": "2", "date": "today"},
        "options": {"replicas": 2},
        "kill": told | {"health": [{"running": 2}, {"running": 1}]},
        "split": {"same": False, "same_tokens": [3, 64], "tokens": 64},
    }
    lines = table(result).splitlines()
    assert "lost 1 × cut; 2 of 3 accepted requests with one terminal event; all back never" in lines[1]
    assert lines[2] == "split over all GPUs: the same up to [3, 64] of 64 greedy tokens as on one"
