"""How often a greedy answer differs from plain decoding of that prompt alone, and whether a near-tie did it:
`python -m tests.campaigns same_text`.

In float32 no answer differs. In half precision sums in another order (more rows, more nodes) round otherwise, and where
two tokens are as good as equal the other one may come first; from there on the texts differ.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_serve.bench.acceptance import Question
from medusa_serve.bench.command import check_numbers, end_options, numbers, run_bench
from medusa_serve.bench.decode import asked_prompts
from medusa_serve.config import EngineConfig, check_int
from medusa_serve.notebook.comparison import gap
from medusa_serve.types import MAX_LOGPROBS, Completion, SamplingParams

if TYPE_CHECKING:
    from medusa_serve.llm import LLM

Row = dict[str, Any]
LOGIT = 16.0  # a likely token's logit is some 10 to 30
ROUNDINGS = 3  # of such a logit: two tokens this close are a near-tie
RULE = (
    "Greedy answers of exactly {tokens} tokens, each beside plain decoding of its prompt alone. different: those that "
    "part from it somewhere. gaps: between the log-probabilities of the two tokens where they part, as plain decoding "
    "holds them. no_tie: of those, more than {near:.4f} apart ({roundings} roundings of a logit of {logit:g}), or the "
    "other token is none of the {top} likeliest. usual_gap: the median between the two likeliest tokens, over all."
)


@dataclass(frozen=True, kw_only=True)
class SameTextConfig:
    """concurrency: sequences that decode together · tokens: of each answer · prompts: a file whose evaluation prompts
    are asked (None: the built-in questions)"""

    concurrency: tuple[int, ...] = (1, 16)
    tokens: int = 96
    prompts: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "concurrency", 1, 1024)
        check_int(self, "tokens", 2, 2**20)


def bench_same_text(engine: EngineConfig, config: SameTextConfig) -> Row:
    """Raises LoadError where no prompt fits."""
    import torch

    from medusa_serve.bench.facts import command, facts, rested
    from medusa_serve.llm import LLM
    from medusa_serve.training.pipeline import ProgressLine

    line = ProgressLine()
    with rested(LLM(replace(engine, slots=max(config.concurrency)))) as llm:
        questions, about = asked_prompts(llm, config.prompts, config.tokens), llm.describe()
        floats = {"float32": torch.float32, "float16": torch.float16}  # quantised weights compute in bfloat16
        near = ROUNDINGS * LOGIT * torch.finfo(floats.get(about["dtype"], torch.bfloat16)).eps
        line.show("plain decoding, one at a time")
        plain = answers(llm, questions, 1, config.tokens, speculation=False, logprobs=2)
        modes = [mode for mode in itertools.product(sorted(config.concurrency), (True, False)) if mode != (1, False)]
        rows = []
        for count, speculation in modes:
            line.show(f"{count} at once, {'with' if speculation else 'without'} speculation")
            found = answers(llm, questions, count, config.tokens, speculation=speculation)
            row = row_of(llm, questions, plain, found, near)
            rows.append({"concurrency": count, "speculation": speculation, **row})
    line.leave()
    names = {"roundings": ROUNDINGS, "logit": LOGIT, "top": MAX_LOGPROBS, "near": near}
    return {
        "kind": "same-text",
        "rule": RULE.format(tokens=config.tokens, **names),
        "machine": facts(),
        "command": command("tests.campaigns"),
        "engine": about,
        "options": asdict(config) | {"prompts": Path(config.prompts or "the built-in questions").name},
        "near": near,
        "usual_gap": round(statistics.median(usual_gaps(plain)), 4),
        "rows": rows,
    }


def answers(
    llm: LLM, questions: Sequence[Question], count: int, tokens: int, *, speculation: bool, logprobs: int | None = None
) -> list[Completion]:
    """`count` at once, in the order of the questions."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, speculation=speculation, logprobs=logprobs)
    parts = [questions[at : at + count] for at in range(0, len(questions), count)]
    return [done for part in parts for done in llm.generate_ids([asked.ids for asked in part], params)]


def row_of(
    llm: LLM, questions: Sequence[Question], plain: Sequence[Completion], found: Sequence[Completion], near: float
) -> Row:
    """How the answers differ from those of plain decoding."""
    gaps: list[float | None] = []
    for asked, want, got in zip(questions, plain, found, strict=True):
        at = parting(want.token_ids, got.token_ids)
        if at is not None:
            gaps.append(gap(llm, [*asked.ids, *want.token_ids[:at]], want.token_ids[at], got.token_ids[at]))
    known = [value for value in gaps if value is not None]
    return {
        "answers": len(found),
        "different": len(gaps),
        "share": round(len(gaps) / len(found), 4),
        "gaps": {"median": round(statistics.median(known), 4), "largest": round(max(known), 4)} if known else None,
        "no_tie": sum(value is None or value > near for value in gaps),
    }


def parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position at which two texts of one length differ."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


def usual_gaps(plain: Sequence[Completion]) -> list[float]:
    """Between the two likeliest tokens at each position."""
    return [token.top[0][1] - token.top[1][1] for done in plain for token in done.logprobs]


# ---- for a person ------------------------------------------------------------------------------------------------


def table(result: Row) -> str:
    facts, engine = result["machine"], result["engine"]
    device = facts["cpu"] if engine["device"] == "cpu" else facts["device"]
    lines = [
        f"{engine['model']} in {engine['dtype']} on {device}, torch {facts['torch']}, {facts['date']}",
        "at once  speculation answers    different  gaps: median  largest  no tie",
    ]
    for row in result["rows"]:
        gaps = row["gaps"] or {}
        cells = "".join(
            f"{gaps[name]:{w}.3f}" if gaps else f"{'-':>{w}}" for name, w in (("median", 14), ("largest", 9))
        )
        different = f"{row['different']} ({row['share']:.1%})"
        word = "on" if row["speculation"] else "off"
        lines.append(f"{row['concurrency']:7}  {word:<11}{row['answers']:8}{different:>13}{cells}{row['no_tie']:8}")
    usual = result["usual_gap"]
    return "\n".join(
        [*lines, f"log-probabilities; the two likeliest tokens of a position are {usual:.3f} apart (median)"]
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concurrency", type=numbers(int), metavar="N,…", help="sequences that decode together (1,16)")
    parser.add_argument("--tokens", type=int, metavar="N", help="of each answer (96)")
    parser.add_argument("--prompts", metavar="FILE", help="ask its evaluation prompts (the built-in questions)")
    parser.add_argument("--max-context", type=int, metavar="N", help="tokens of prompt and completion")
    end_options(parser, run)


def run(options: argparse.Namespace) -> int:
    return run_bench(options, "same-text", SameTextConfig, bench_same_text, table)
