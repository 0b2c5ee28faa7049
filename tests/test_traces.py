"""Timed traces of valid requests that share passes: whatever arrives or leaves when, each output is what its request
gives alone (the idea of GRIEF, arXiv 2605.11202). `trace(seed)` makes a failing one again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.types import SamplingParams
from tests.fakes import Collector
from tests.oracles import Oracle, engine
from tests.tiny import VOCAB, tiny_model, tiny_prompts

CONFIG = EngineConfig(slots=4, max_context=96, tree="8", prefill_chunk=8, max_queue=16)
PROMPTS = [prompt[:length] for prompt, length in zip(tiny_prompts(8, 20), (3, 5, 8, 9, 13, 16, 17, 20), strict=True)]
KINDS = (
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, seed=2, top_k=20),
    SamplingParams(temperature=1.3, seed=3, top_p=0.9, min_p=0.01),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(temperature=1.0, seed=4, presence_penalty=1.0, frequency_penalty=0.5),
    SamplingParams(logit_bias={5: 2.0, 7: -100.0}),
    SamplingParams(temperature=1.0, seed=5, speculation=False),
)
LONGEST = 8
Solo = Callable[[int, int], list[int]]


class Request(NamedTuple):
    """One of a trace: which prompt, how to sample, how long; the turns it comes and, if it does not stay, leaves."""

    prompt: int
    kind: int
    max_tokens: int
    comes: int
    leaves: int | None


def trace(seed: int) -> list[Request]:
    """2 to 16 requests, in the order they come."""
    draw = random.Random(seed)
    span = draw.choice([1, 6, 20])  # all at once, or one after the other
    requests = []
    for _ in range(draw.randint(2, 16)):
        comes = draw.randrange(span)
        leaves = comes + draw.randrange(8) if draw.random() < 0.15 else None
        tokens = draw.randint(1, LONGEST)
        requests.append(Request(draw.randrange(len(PROMPTS)), draw.randrange(len(KINDS)), tokens, comes, leaves))
    return sorted(requests, key=lambda request: request.comes)


def play(manager, requests: list[Request]) -> Iterator[tuple[Request, list[int]]]:
    """Each request that stayed, with its output."""
    sink, ids, turn = Collector(), {}, 0
    waiting = list(requests)
    while waiting or manager._open:
        while waiting and waiting[0].comes <= turn:
            request = waiting.pop(0)
            params = replace(KINDS[request.kind], max_tokens=request.max_tokens)
            ids[manager.submit(PROMPTS[request.prompt], params, sink)] = request
        for id, request in ids.items():
            if request.leaves is not None and request.leaves <= turn:
                manager.cancel(id)
        manager.step()
        turn += 1
        assert turn < 2000, "it never ends"
    for id, request in ids.items():
        if request.leaves is None:
            last = sink.last(id)
            assert last is not None
            assert last.completion is not None, last.error
            yield request, list(last.completion.token_ids)


@pytest.fixture(scope="module")
def alone() -> Iterator[Solo]:
    """What a prompt gives with a kind of sampling: decoded plainly, by itself."""
    with engine(tiny_model("llama", torch.float32), replace(CONFIG, slots=1, tree="off", lookup=False)) as manager:

        @cache
        def solo(prompt: int, kind: int) -> list[int]:
            [(_, ids)] = play(manager, [Request(prompt, kind, LONGEST, 0, None)])
            return ids

        yield solo


def check(seeds: range, alone: Solo) -> int:
    """→ outputs that were compared"""
    compared = 0
    with engine(tiny_model("llama", torch.float32), CONFIG, Oracle("random", VOCAB)) as manager:
        for seed in seeds:
            for request, ids in play(manager, trace(seed)):
                assert ids == alone(request.prompt, request.kind)[: request.max_tokens], f"trace {seed}: {request}"
                compared += 1
            manager.step()  # an idle turn audits the slots
    return compared


def test_a_few_traces(alone: Solo) -> None:
    assert check(range(6), alone) > 20


@pytest.mark.slow
def test_a_thousand_traces(alone: Solo) -> None:
    assert check(range(6, 1006), alone) > 7000
