"""What the engine is worth: `python -m tests.campaigns engine`. Ratios within one run count; times are noise.

plain    tokens/s of one sequence without speculation over transformers' `generate` in the same dtype
streams  tokens/s of 8 concurrent HTTP streams over one stream, speculation off
lookup   tokens per step on summarise and rewrite prompts, lookup on; the texts must equal plain decoding
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
import urllib.request
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from medusa_serve.bench.command import end_options, run_bench
from medusa_serve.bench.facts import machine, rested
from medusa_serve.bench.questions import read_prompts
from medusa_serve.config import EngineConfig, check_int
from medusa_serve.types import Completion, SamplingParams

from .serving import served

if TYPE_CHECKING:
    from medusa_serve.llm import LLM


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """tokens: of each answer · rounds: interleaved repetitions, of which the median counts · streams: HTTP clients"""

    tokens: int = 96
    rounds: int = 5
    streams: int = 8

    def __post_init__(self) -> None:
        check_int(self, "tokens", 8, 1024)
        check_int(self, "rounds", 1, 100)
        check_int(self, "streams", 1, 64)


def bench_engine(engine: EngineConfig, bench: BenchConfig) -> dict[str, Any]:
    """The three figures of the engine, with what they were measured on."""
    from medusa_serve.llm import LLM

    config = replace(engine, heads="none")
    with rested(LLM(config)) as llm:
        lookup = lookup_acceptance(llm, bench.tokens)
        streams = stream_ratio(llm, bench)
        facts = llm.describe()
    found = {"plain": plain_ratio(config, bench), "streams": streams, "lookup": lookup}
    return {"kind": "engine", "machine": machine(), "engine": facts, **found}


def plain_ratio(config: EngineConfig, bench: BenchConfig) -> dict[str, Any]:
    """Our plain decoding and `generate`, in turn, over the same prompts and number of tokens."""
    from medusa_serve.llm import LLM
    from medusa_serve.model.loading.load import load_model

    loaded = load_model(config)
    params = SamplingParams(max_tokens=bench.tokens, ignore_eos=True)
    prompts = [loaded.codec.encode_chat([{"role": "user", "content": text}]) for text in read_prompts().questions]
    ours: list[float] = []
    theirs: list[float] = []
    with rested(LLM(replace(config, tree="off"))) as llm:
        for index in range(bench.rounds + 1):  # the first round warms up
            prompt = prompts[index % len(prompts)]
            mine = _timed(lambda ids=prompt: llm.generate_ids([ids], params))
            other = _timed(lambda ids=prompt: _generate(loaded.model, ids, bench.tokens))
            if index:
                ours.append(bench.tokens / mine)
                theirs.append(bench.tokens / other)
    return {
        "ours_tokens_per_second": round(statistics.median(ours), 2),
        "generate_tokens_per_second": round(statistics.median(theirs), 2),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3),
    }


def _generate(model: Any, ids: list[int], tokens: int) -> None:
    import torch

    prompt = torch.tensor([ids], device=model.device)
    limits = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **limits)


def _timed(run: Any) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def lookup_acceptance(llm: LLM, tokens: int) -> dict[str, Any]:
    """Tokens per step over summarise and rewrite prompts, and whether the texts equal plain decoding."""
    prompts = [[{"role": "user", "content": text}] for text in read_prompts().rewrites]
    fast = llm.generate(prompts, SamplingParams(max_tokens=tokens))
    plain = llm.generate(prompts, SamplingParams(max_tokens=tokens, speculation=False))
    alone = [llm.generate([prompt], SamplingParams(max_tokens=tokens))[0] for prompt in prompts]
    return {
        "prompts": len(prompts),
        "tokens_per_step": round(_per_step(alone), 3),
        "tokens_per_step_in_company": round(_per_step(fast), 3),
        "texts_equal_plain": sum(
            a.token_ids == b.token_ids == c.token_ids for a, b, c in zip(fast, plain, alone, strict=True)
        ),
    }


def _per_step(completions: list[Completion]) -> float:
    return sum(c.completion_tokens - 1 for c in completions) / max(1, sum(c.steps for c in completions))


def stream_ratio(llm: LLM, bench: BenchConfig) -> dict[str, Any]:
    """One HTTP stream and `bench.streams` of them at once, in turn; speculation off."""
    one: list[float] = []
    many: list[float] = []
    with served(llm) as url:
        for index in range(bench.rounds + 1):
            single = _streams(url, 1, bench.tokens, index)
            together = _streams(url, bench.streams, bench.tokens, index)
            if index:
                one.append(single)
                many.append(together)
    return {
        "streams": bench.streams,
        "one_tokens_per_second": round(statistics.median(one), 2),
        "all_tokens_per_second": round(statistics.median(many), 2),
        "ratio": round(statistics.median(b / a for a, b in zip(one, many, strict=True)), 3),
    }


def _streams(url: str, count: int, tokens: int, offset: int) -> float:
    """Completion tokens per second of `count` streams that start together."""
    totals: list[int] = []
    questions = read_prompts().questions

    def client(number: int) -> None:
        question = questions[(number + offset) % len(questions)]
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens}
        body |= {"stream": True, "speculation": False}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), headers)
        last: dict[str, Any] = {}
        with urllib.request.urlopen(request, timeout=600) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    last = json.loads(line[6:])
        totals.append(last["usage"]["completion_tokens"])

    threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(totals) != count:
        raise RuntimeError(f"{count - len(totals)} of {count} streams failed.")
    return sum(totals) / (time.perf_counter() - started)


def table(result: dict[str, Any]) -> str:
    """The figures as lines for a person."""
    plain, streams, lookup = result["plain"], result["streams"], result["lookup"]
    facts, engine = result["machine"], result["engine"]
    return "\n".join(
        [
            f"{engine['model']} in {engine['dtype']} on {facts['device']}, {facts['threads']} threads, "
            f"torch {facts['torch']}, transformers {facts['transformers']}, {facts['date']}",
            f"plain decoding over generate          {plain['ratio']:.2f}x  "
            f"({plain['ours_tokens_per_second']} / {plain['generate_tokens_per_second']} tokens/s)",
            f"{streams['streams']} HTTP streams over one                {streams['ratio']:.2f}x  "
            f"({streams['all_tokens_per_second']} / {streams['one_tokens_per_second']} tokens/s)",
            f"lookup, summarise and rewrite         {lookup['tokens_per_step']:.2f} tokens per step, "
            f"{lookup['texts_equal_plain']} of {lookup['prompts']} texts equal plain decoding",
        ]
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, metavar="N", help="of each answer (96)")
    parser.add_argument("--rounds", type=int, metavar="N", help="repetitions, of which the median counts (5)")
    parser.add_argument("--slots", type=int, metavar="N", help="sequences that decode together (default: from memory)")
    parser.add_argument("--max-context", type=int, metavar="N", help="tokens of prompt and completion")
    end_options(parser, run)


def run(options: argparse.Namespace) -> int:
    return run_bench(options, "engine", BenchConfig, bench_engine, table)
