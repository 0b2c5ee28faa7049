"""Tokens per second and per step by how many sequences decode together: `medusa-serve bench decode`.

plain  an engine without heads and lookup, one token a step
off    the engine as it is served, every request with `speculation: false`
auto   the same engine, its own choice of nodes
N      an engine with a fixed tree of N nodes
"""

from __future__ import annotations

import argparse
import queue
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import MAX_NODES, EngineConfig, check_int
from ..errors import InvalidConfig, LoadError
from ..types import Completion, Delta, SamplingParams
from .acceptance import Question, encoded
from .command import check_numbers, end_options, numbers, run_bench
from .plot import decode_table

if TYPE_CHECKING:
    from ..llm import LLM

Row = dict[str, Any]
Deliveries = list[tuple[float, list[tuple[str, Delta]]]]
RULE = (
    "`concurrency` prompts are sent together and answered with exactly {tokens} tokens each; all modes in turn in each "
    "round, with the same prompts; medians over {rounds} rounds, what comes first thrown away. tokens_per_second: of "
    "all sequences, while all of them decode (no prefill, no tail). whole_tokens_per_second: from the first submission "
    "to the last token. tokens_per_step, nodes_per_step: of one sequence. same_text: share of the answers that are "
    "those of `off`. Ratios: the median over rounds of the ratio within a round."
)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Every number of sequences with every mode.

    concurrency  sequences that decode together · nodes  fixed sizes of tree, the root counts · tokens  of each answer ·
    rounds  that count · prompts  a file whose evaluation prompts are asked (None: the built-in questions) ·
    one_at_a_time  never two engines in memory: slower, and more time passes from one mode of a round to the next
    """

    concurrency: tuple[int, ...] = (1, 2, 4, 8)
    nodes: tuple[int, ...] = (4, 8, 16)
    temperature: float = 0.0
    tokens: int = 96
    rounds: int = 5
    prompts: str | None = None
    one_at_a_time: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, "concurrency", 1, 1024)
        check_numbers(self, "nodes", 2, MAX_NODES)
        if not 0 <= self.temperature <= 100:  # not a number is neither
            raise InvalidConfig("temperature must be a number from 0 to 100.", param="temperature")
        check_int(self, "tokens", 2, 2**20)
        check_int(self, "rounds", 1, 1000)


class Mode(NamedTuple):
    """A way to decode: the engine's tree, and what requests ask for."""

    name: str
    tree: str
    speculation: bool = True


class Turn(NamedTuple):
    """One mode's part of a round; `counts` is false where it only warms up."""

    concurrency: int
    mode: Mode
    number: int
    counts: bool


class Span(NamedTuple):
    """Tokens, seconds and steps while all sequences decoded."""

    tokens: int
    seconds: float
    steps: int


class Sample(NamedTuple):
    """What a turn gave; `span` is None where its sequences never all decoded at once."""

    answers: list[Completion]
    seconds: float
    span: Span | None

    def rate(self, whole: bool) -> float:
        """Tokens per second, of all sequences."""
        if self.span is not None and not whole:
            return self.span.tokens / self.span.seconds
        return sum(answer.completion_tokens for answer in self.answers) / self.seconds


Taken = dict[tuple[int, str], list[Sample]]  # by concurrency and mode, a sample for each round


def bench_decode(engine: EngineConfig, config: DecodeConfig) -> dict[str, Any]:
    """All rows and ratios. Raises LoadError: no prompt fits, a tree that cannot be filled, or nothing to draft from."""
    from ..training.pipeline import ProgressLine
    from .facts import command, facts

    line, taken = ProgressLine(), Taken()
    with Engines(replace(engine, slots=max(config.concurrency)), config.one_at_a_time) as engines:
        auto = engines.get("auto")
        about = auto.describe()
        if not about["drafts"]:
            raise LoadError("There is nothing to compare: this engine has neither heads nor lookup to draft from.")
        prompts = asked_prompts(auto, config.prompts, config.tokens)
        for turn in turns(config):
            sample = _measure(engines.get(turn.mode.tree), turn, prompts, config)
            if not turn.counts:  # no engine may capture steps while another one is measured
                engines.rest()
            if turn.counts:
                taken.setdefault((turn.concurrency, turn.mode.name), []).append(sample)
            line.show(f"{turn.concurrency} at once, {turn.mode.name}: {sample.rate(whole=True):.1f} tokens/s")
        line.leave()
    options = asdict(config) | {"prompts": Path(config.prompts or "the built-in questions").name}
    return {
        "kind": "decode",
        "rule": RULE.format(**options),
        "machine": facts(),
        "command": command(),
        "engine": about,
        "options": options,
        "rows": [row_of(taken, count, mode.name) for count in sorted(config.concurrency) for mode in modes(config)],
        "ratios": [ratios_of(taken, count) for count in sorted(config.concurrency)],
    }


class Engines(ExitStack):
    """The engines of a run by their tree, opened when first asked for. All stay open, or only the last one."""

    def __init__(self, config: EngineConfig, one_at_a_time: bool) -> None:
        super().__init__()
        self._config, self._one_at_a_time = config, one_at_a_time
        self._open: dict[str, LLM] = {}

    def get(self, tree: str) -> LLM:
        from ..llm import LLM
        from ..server.gc_freeze import loaded_is_kept

        if tree not in self._open:
            if self._one_at_a_time:
                self._open.clear()
                self.close()
            self._open[tree] = self.enter_context(LLM(replace(self._config, tree=tree)))
            self.enter_context(loaded_is_kept())  # as a server's process has it
        return self._open[tree]

    def rest(self) -> None:
        """Wait until all engines have done the work that they leave for idle time."""
        from .facts import rested

        for llm in self._open.values():
            rested(llm)


def modes(config: DecodeConfig) -> list[Mode]:
    fixed = [Mode(str(nodes), str(nodes)) for nodes in config.nodes]
    return [Mode("plain", "off"), Mode("off", "auto", speculation=False), Mode("auto", "auto"), *fixed]


def turns(config: DecodeConfig) -> Iterator[Turn]:
    """A round's modes are neighbours in time; one engine at a time, each opening warms up anew."""
    every, counts = modes(config), sorted(config.concurrency)
    if not config.one_at_a_time:
        for count in counts:
            for number in range(config.rounds + 1):
                shift = number % len(every)  # which mode comes first changes
                yield from (Turn(count, mode, number, number > 0) for mode in every[shift:] + every[:shift])
        return
    for number in range(1, config.rounds + 1):
        for tree in dict.fromkeys(mode.tree for mode in every):
            mine = [mode for mode in every if mode.tree == tree]
            for counted in (False, True):
                yield from (Turn(count, mode, number, counted) for count in counts for mode in mine)


def asked_prompts(llm: LLM, source: str | None, tokens: int) -> list[Question]:
    """As the server would encode them, in an order that mixes categories; without prompts that do not fit."""
    from ..training import prompts as files
    from .questions import read_prompts

    if source is None:
        return encoded(llm, [files.Prompt(text) for text in read_prompts().questions], tokens)
    chosen = files.split(files.read_prompts(source))[1]
    return sorted(encoded(llm, chosen, tokens), key=lambda asked: asked.seed)


def _measure(llm: LLM, turn: Turn, prompts: Sequence[Question], config: DecodeConfig) -> Sample:
    """Send the round's prompts together and wait for all answers."""
    inbox: queue.SimpleQueue[tuple[float, list[tuple[str, Delta]]]] = queue.SimpleQueue()

    def sink(news: list[tuple[str, Delta]]) -> None:
        inbox.put((time.perf_counter(), news))

    fixed: Any = {"temperature": config.temperature, "speculation": turn.mode.speculation, "ignore_eos": True}
    got, ids, answers = Deliveries(), list[str](), dict[str, Completion]()
    started = time.perf_counter()
    try:
        for index in range(turn.concurrency):
            asked = prompts[(turn.number * turn.concurrency + index) % len(prompts)]
            params = SamplingParams(max_tokens=config.tokens, seed=asked.seed, **fixed)
            # one key for each turn: no mode finds a prompt in the cache that another mode computed
            ids.append(llm.manager.submit(asked.ids, params, sink, key=repr(turn)))
        while len(answers) < len(ids):
            got.append(inbox.get())
            for sequence_id, delta in got[-1][1]:
                if delta.error is not None:
                    raise delta.error
                if delta.completion is not None:
                    answers[sequence_id] = delta.completion
    finally:
        for sequence_id in ids:
            llm.manager.cancel(sequence_id)
    return Sample([answers[one] for one in ids], got[-1][0] - started, together(got, turn.concurrency))


def together(deliveries: Deliveries, count: int) -> Span | None:
    """From the last first token to the first end; a delivery is a step. None where never all `count` decoded."""
    begun = set[str]()
    tokens, steps, since, until = 0, 0, 0.0, 0.0
    for at, news in deliveries:
        if len(begun) == count:
            tokens, steps, until = tokens + sum(sum(delta.tokens) for _, delta in news), steps + 1, at
        begun |= {sequence_id for sequence_id, _ in news}
        since = since if steps else at
        if any(delta.is_last for _, delta in news):
            break
    return Span(tokens, until - since, steps) if until > since else None


def row_of(taken: Taken, concurrency: int, mode: str) -> Row:
    samples = taken[concurrency, mode]
    spans = [sample.span for sample in samples if sample.span]
    answers = [answer for sample in samples for answer in sample.answers]
    others = [answer for sample in taken[concurrency, "off"] for answer in sample.answers]
    same = [answer.token_ids == other.token_ids for answer, other in zip(answers, others, strict=True)]
    steps = sum(answer.steps for answer in answers)
    row: Row = {"concurrency": concurrency, "mode": mode, "tokens_per_second": None, "step_ms": None}
    if len(spans) == len(samples):
        row["tokens_per_second"] = round(statistics.median(sample.rate(whole=False) for sample in samples), 2)
        row["step_ms"] = round(statistics.median(span.seconds / span.steps for span in spans) * 1000, 4)
    return row | {
        "whole_tokens_per_second": round(statistics.median(sample.rate(whole=True) for sample in samples), 2),
        "tokens_per_step": round(sum(answer.completion_tokens - 1 for answer in answers) / steps, 4),
        "nodes_per_step": round(1 + sum(answer.drafted for answer in answers) / steps, 2),
        "same_text": round(statistics.mean(same), 4),
    }


def ratios_of(taken: Taken, concurrency: int) -> Row:
    """auto over the best of the others, over `off` and over `plain`: while all decode, where all of them ever did."""
    mine = {mode: samples for (count, mode), samples in taken.items() if count == concurrency}
    whole = any(sample.span is None for samples in mine.values() for sample in samples)
    rates = {mode: [sample.rate(whole) for sample in samples] for mode, samples in mine.items()}
    best = max((mode for mode in rates if mode != "auto"), key=lambda mode: statistics.median(rates[mode]))
    row: Row = {"concurrency": concurrency, "whole": whole, "best": best}
    for name, mode in (("best", best), ("off", "off"), ("plain", "plain")):
        ratios = [a / b for a, b in zip(rates["auto"], rates[mode], strict=True)]
        row[f"auto_over_{name}"] = round(statistics.median(ratios), 4)
    return row


# ---- the command -------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--concurrency", type=numbers(int), metavar="N,…", help="sequences that decode together (1,2,4,8)")
    add("--nodes", type=numbers(int), metavar="N,…", help="fixed sizes of tree, besides auto (4,8,16)")
    add("--temperature", type=float, metavar="T", help="0 (the default) is greedy")
    add("--tokens", type=int, metavar="N", help="of each answer (96)")
    add("--rounds", type=int, metavar="N", help="repetitions, of which the median counts (5)")
    add("--prompts", metavar="FILE", help="ask its evaluation prompts (the built-in questions)")
    add("--one-at-a-time", action="store_true", default=None, help="never two engines in memory; slower")
    add("--max-context", type=int, metavar="N", help="tokens of prompt and completion (the engine's default)")
    add("--no-lookup", dest="lookup", action="store_false", help="do not draft from the sequence's own tokens")
    end_options(parser, run)


def run(options: argparse.Namespace) -> int:
    return run_bench(options, "decode", DecodeConfig, bench_decode, decode_table)
