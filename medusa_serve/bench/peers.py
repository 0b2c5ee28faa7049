"""Tokens per second of this engine and of what a user would take instead, in one run: `medusa-serve bench peers`.

Each round gives all contestants the same prompts, in turn, and asks for the same number of tokens, even past an end of
text. A figure is the median over rounds, a ratio that of two medians; prefill counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..config import EngineConfig, check_int
from ..errors import InvalidConfig, LoadError
from .command import end_options, run_bench
from .contestants import CONTESTANTS, Contestant, LeftOut, Match, Prompts, reason

OURS, PLAIN = "speculative", "plain"
DISTURBED = 0.2  # cores that other processes may keep busy
RULE = (
    "At least {prompts} prompts a round, {concurrency} at once, {tokens} tokens each, greedy, past any end of text, "
    "no KV prefix kept from one prompt to the next. Every prompt goes to all contestants in turn, the order changes "
    "with the round; {rounds} rounds after one that warms up. tokens_per_second: the median over rounds of tokens "
    "over seconds, prefill included. ratio: the median of {ours} over this one's. same_as_plain: answers that equal "
    "those of {plain}."
)


@dataclass(frozen=True, kw_only=True)
class PeersConfig:
    """contestants: names in CONTESTANTS · prompts: of a round, at least · tokens: of each answer · rounds: that count,
    after one that warms up · concurrency: prompts answered at once, by contestants that can"""

    contestants: tuple[str, ...] = tuple(CONTESTANTS)
    prompts: int = 4
    tokens: int = 96
    rounds: int = 5
    concurrency: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.contestants if name not in CONTESTANTS]
        if unknown or not self.contestants or len(set(self.contestants)) < len(self.contestants):
            known = ", ".join(CONTESTANTS)
            raise InvalidConfig(f"contestants must be different names among {known}.", param="contestants")
        check_int(self, "prompts", 1, 1024)
        check_int(self, "tokens", 2, 4096)
        check_int(self, "rounds", 1, 100)
        check_int(self, "concurrency", 1, 1024)


@dataclass
class Entry:
    """A contestant in the contest: its rounds in tokens/s, its last answer to each batch, or why it is out."""

    name: str
    contestant: Contestant | None = None
    left_out: str | None = None
    rounds: list[float] = field(default_factory=list)
    answers: dict[int, list[list[int]]] = field(default_factory=dict)

    def drop(self, why: str) -> None:
        self.left_out, self.rounds = why, []
        self.close()

    def close(self) -> None:
        contestant, self.contestant = self.contestant, None
        if contestant is not None:
            contestant.close()


# ---- the run ---------------------------------------------------------------------------------------------------------


def bench_peers(engine: EngineConfig, config: PeersConfig) -> dict[str, Any]:
    """The contest, with what it was run on. Raises LoadError: the model cannot be loaded, or no contestant runs."""
    from ..model.loading.load import load_model
    from ..training.distill import encode
    from .facts import Others, command, facts
    from .questions import read_prompts

    codec = load_model(replace(engine, quantize="none")).codec
    batches = batches_of([encode(codec, text) for text in read_prompts().questions], config)
    match = Match(engine, config.tokens, config.concurrency, max((p for b in batches for p in b), key=len))
    entries = [_enter(name, match) for name in config.contestants]
    others = Others()
    rows = contest(entries, batches, config)
    if all(row["left_out"] for row in rows):
        raise LoadError(f"No contestant could run; {rows[0]['name']}: {rows[0]['left_out']}.")
    options = {name: getattr(config, name) for name in ("prompts", "concurrency", "tokens", "rounds")}
    return {
        "kind": "peers",
        "rule": RULE.format(**options, ours=OURS, plain=PLAIN),
        "machine": facts() | {"others_cores": others.cores()},
        "command": command(),
        "engine": asdict(engine),
        "options": options,
        "rows": rows,
    }


def batches_of(encoded: Prompts, config: PeersConfig) -> list[Prompts]:
    """The prompts of a round as they are sent together; they begin again from the first as often as needed."""
    size = config.concurrency
    count = -(-config.prompts // size)
    return [[encoded[(size * batch + i) % len(encoded)] for i in range(size)] for batch in range(count)]


def _enter(name: str, match: Match) -> Entry:
    try:
        return Entry(name, CONTESTANTS[name][1](match))
    except LeftOut as why:
        return Entry(name, left_out=str(why))
    except Exception as error:  # other people's code: whatever it raises is its line in the table
        return Entry(name, left_out=reason(error))


def contest(entries: Sequence[Entry], batches: Sequence[Prompts], config: PeersConfig) -> list[dict[str, Any]]:
    """Run all rounds; → a row for each entry, also for one that fails on the way. Closes the contestants."""
    from ..training.pipeline import ProgressLine

    line = ProgressLine()
    facts = dict[str, dict[str, Any]]()
    try:
        for index in range(config.rounds + 1):
            line.show(f"round {index} of {config.rounds}" if index else "warming up")
            turn = index % len(entries)
            _round([*entries[turn:], *entries[:turn]], batches, config.tokens, counts=index > 0)
        line.end(f"{config.rounds} rounds")
        facts = {entry.name: dict(entry.contestant.facts) for entry in entries if entry.contestant is not None}
    finally:
        for entry in entries:
            entry.close()
    return rows_of(entries, facts)


def _round(entries: Sequence[Entry], batches: Sequence[Prompts], tokens: int, *, counts: bool) -> None:
    from ..model.cpu.workers import give_up_workers

    seconds = {entry.name: 0.0 for entry in entries}
    for number, batch in enumerate(batches):
        for entry in entries:
            if entry.contestant is None:
                continue
            started = time.perf_counter()
            try:
                answers = entry.contestant.answer(batch)
            except Exception as error:  # see _enter
                entry.drop(reason(error))
                continue
            seconds[entry.name] += time.perf_counter() - started
            give_up_workers()  # else the workers of a contestant in this thread would slow one in another thread
            made = [len(answer) for answer in answers]
            if made != [tokens] * len(batch):  # then its time says nothing
                entry.drop(f"it made {sum(made)} tokens where {tokens * len(batch)} were asked for")
            entry.answers[number] = answers
    if counts:
        for entry in entries:
            if entry.contestant is not None:
                entry.rounds.append(tokens * sum(map(len, batches)) / seconds[entry.name])


def rows_of(entries: Sequence[Entry], facts: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    medians = {entry.name: statistics.median(entry.rounds) for entry in entries if entry.rounds}
    expected = next((entry.answers for entry in entries if entry.name == PLAIN and entry.rounds), None)
    rows = []
    for entry in entries:
        row: dict[str, Any] = {"name": entry.name, "label": CONTESTANTS[entry.name][0], "left_out": entry.left_out}
        if entry.rounds:
            mine = medians[entry.name]
            row["tokens_per_second"] = round(mine, 2)
            row["ratio"] = round(medians[OURS] / mine, 3) if OURS in medians else None
            row["rounds"] = [round(value, 2) for value in entry.rounds]
            row["same_as_plain"] = None if expected is None else _equal(entry.answers, expected)
            row["answers"] = sum(map(len, entry.answers.values()))
        rows.append(row | facts.get(entry.name, {}))
    return rows


def _equal(mine: Mapping[int, list[list[int]]], theirs: Mapping[int, list[list[int]]]) -> int:
    return sum(a == b for number in mine for a, b in zip(mine[number], theirs[number], strict=True))


# ---- for a person ----------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """A line for each contestant, the quickest first; then a line for each that was left out, with the reason."""
    facts, options = result["machine"], result["options"]
    llama = f", llama-cpp-python {facts['llama-cpp-python']}" if facts["llama-cpp-python"] else ""
    device = facts["cpu"] if facts["device"].endswith("CPU") else facts["device"]
    lines = [
        f"{result['engine']['model']} on {device}, {facts['threads']} threads, torch {facts['torch']}, transformers "
        f"{facts['transformers']}{llama}, {facts['date']}: {options['tokens']} tokens each, greedy, "
        f"{options['concurrency']} at once",
        f"{'':34}{'dtype':10}{'tokens/s':>9}{'ours over it':>14}  answers as plain",
    ]
    ran = [row for row in result["rows"] if not row["left_out"]]
    for row in sorted(ran, key=lambda row: -row["tokens_per_second"]):
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] and row["name"] != OURS else "-"
        same = "-" if row["same_as_plain"] is None else f"{row['same_as_plain']} of {row['answers']}"
        lines.append(f"{row['label']:34}{row['dtype']:10}{row['tokens_per_second']:9.1f}{ratio:>14}  {same}")
    if (facts["others_cores"] or 0) > DISTURBED:
        lines.append(
            f"Other processes kept {facts['others_cores']:.1f} cores busy meanwhile: do not trust the figures."
        )
    lines += [f"{row['label']:34}left out: {row['left_out']}" for row in result["rows"] if row["left_out"]]
    return "\n".join(lines)


# ---- the command -----------------------------------------------------------------------------------------------------


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def add_options(parser: argparse.ArgumentParser) -> None:
    known = ",".join(CONTESTANTS)
    parser.add_argument("--contestants", type=names, metavar="A,…", help=f"{known} (all of them)")
    parser.add_argument("--prompts", type=int, metavar="N", help="of a round, at least (4)")
    parser.add_argument("--tokens", type=int, metavar="N", help="of each answer (96)")
    parser.add_argument("--rounds", type=int, metavar="N", help="interleaved repetitions; the median counts (5)")
    parser.add_argument("--concurrency", type=int, metavar="N", help="prompts at once, for contestants that can (1)")
    end_options(parser, run)


def run(options: argparse.Namespace) -> int:
    return run_bench(options, "peers", PeersConfig, bench_peers, table)
