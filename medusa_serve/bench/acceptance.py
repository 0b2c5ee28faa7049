"""How many tokens a decode step emits, by kind of prompt and size of tree: `medusa-serve bench acceptance`.

Acceptance depends on the model, the heads and the prompts: what a GPU measures holds for a CPU, up to near-ties of the
dtype. Only `decode_ms` depends on the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import MAX_NODES, EngineConfig, check_int
from ..errors import InvalidRequest, LoadError
from ..presets import FAMILIES, shipped_heads
from ..types import SamplingParams
from .command import check_folder, check_numbers, numbers, read, run_bench, write

if TYPE_CHECKING:
    from ..llm import LLM
    from ..training.prompts import Prompt

Row = dict[str, Any]
KINDS = ("all", "no loops")
RULE = (
    "Evaluation prompts: sha256 mod 100 is 0, without near-duplicates of the others, at most {per_category} of a "
    "category. Each is one chat message; {sequences} at once are answered with at most {max_tokens} tokens, each with "
    "a full tree, drafts from the heads only; at T > 0 with a seed from the prompt's sha256. Acceptance: the sum of "
    "(completion tokens - 1) over the sum of decode steps. A loop: some run of 8 tokens is three times in the answer. "
    "decode_ms: the median over answers of the decode time per step."
)


@dataclass(frozen=True, kw_only=True)
class AcceptanceConfig:
    """Every size of tree (the root counts) with every temperature, over the evaluation prompts of a file.

    per_category  prompts of a category at most · max_tokens  of an answer · sequences  answered at once: steps are
    counted for each of them, so that acceptance does not depend on it, only decode_ms does · out  where the result is
    kept
    """

    prompts: str
    nodes: tuple[int, ...] = (4, 8, 16, 24, 32, 64)
    temperatures: tuple[float, ...] = (0.0, 0.7)
    per_category: int = 25
    max_tokens: int = 128
    sequences: int = 1
    out: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "nodes", 2, MAX_NODES)
        check_numbers(self, "temperatures", 0, 100)
        check_int(self, "per_category", 1, 2**20)
        check_int(self, "max_tokens", 2, 2**20)
        check_int(self, "sequences", 1, 1024)


class Question(NamedTuple):
    """An evaluation prompt as it is sent."""

    category: str
    ids: list[int]
    seed: int


class Answer(NamedTuple):
    """What counts of a completion."""

    category: str
    tokens: int
    steps: int
    decode_ms: float
    looped: bool


# ---- the run -----------------------------------------------------------------------------------------------------


def bench_acceptance(engine: EngineConfig, config: AcceptanceConfig) -> dict[str, Any]:
    """Measure what `config.out` does not hold yet; → the full result, written there after each (N, temperature).

    Raises LoadError: no heads, a file of other options in the way, a tree that the heads cannot fill.
    """
    from ..training.prompts import read_prompts, split
    from .facts import machine

    heads = heads_path(engine)
    prompts = split(read_prompts(config.prompts), config.per_category)[1]
    if not prompts:
        raise LoadError(f"{config.prompts} holds no evaluation prompt (by its hash, one in a hundred is one).")
    options = {
        "model": engine.model,
        "per_category": config.per_category,
        "max_tokens": config.max_tokens,
        "sequences": config.sequences,
        "heads_sha256": heads_digest(heads),
        "prompts_sha256": hashlib.sha256(b"".join(_bytes(prompt) + b"\0" for prompt in prompts)).hexdigest(),
    }
    result = _stored(config.out, options) if config.out else None
    if result is None:
        rule = RULE.format(**{name: options[name] for name in ("per_category", "max_tokens", "sequences")})
        result = {"kind": "acceptance", "rule": rule, "machine": machine(), "heads": engine.heads, "options": options}
        result |= {"engine": None, "evaluation": None, "rows": []}
    for nodes in sorted(config.nodes):
        done = {row["temperature"] for row in result["rows"] if row["nodes"] == nodes}
        missing = [temperature for temperature in config.temperatures if temperature not in done]
        if missing:
            one = replace(engine, tree=str(nodes), lookup=False, slots=config.sequences)
            _measure(one, config, prompts, missing, result)
    return result


def _measure(
    engine: EngineConfig,
    config: AcceptanceConfig,
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    result: dict[str, Any],
) -> None:
    """Add one tree's rows. The model is loaded again for each tree: seconds, against minutes of decoding."""
    from ..llm import LLM
    from ..training.pipeline import ProgressLine
    from .facts import machine, rested

    nodes = int(engine.tree)
    with rested(LLM(engine)) as llm:
        facts = {name: value for name, value in llm.describe().items() if name != "nodes"}
        facts["hardware"] = machine()["device"]  # times of two devices must not mix in one file
        if result["engine"] is not None and result["engine"] != facts:
            raise LoadError(
                f"{config.out} was measured with {_differing(result['engine'], facts)}; give another --out."
            )
        questions = encoded(llm, prompts, config.max_tokens)
        counts = {"prompts": len(prompts), "left_out": len(prompts) - len(questions)}
        result |= {"engine": facts, "evaluation": counts}
        for temperature in temperatures:
            line, answers, text = ProgressLine(), list[Answer](), ""
            for answer in _answers(llm, questions, temperature, config):
                answers.append(answer)
                text = f"{nodes} nodes, T {temperature:g}: {len(answers)}/{len(questions)} answers, "
                text += f"{_cell(_row(answers))} tokens per step"
                line.show(text)
            line.end(text)
            result["rows"] += rows_of(answers, nodes, temperature)
            if config.out:
                write(config.out, result)


def heads_path(engine: EngineConfig) -> Path:
    """The file or folder that the engine will draft from. Raises LoadError where there are no heads to measure."""
    path = None
    if engine.heads in ("auto", *FAMILIES):
        path = shipped_heads(engine.model, engine.heads)
    elif engine.heads != "none":
        path = Path(engine.heads).expanduser()
    if path is None:
        raise LoadError(f"There are no heads to measure: none ship for {engine.model}, or none were asked for.")
    return path


def encoded(llm: LLM, prompts: Sequence[Prompt], max_tokens: int) -> list[Question]:
    """As the server would encode them, without prompts that the template refuses or the context does not hold."""
    from ..training.distill import encode

    room = llm.describe()["max_context"] - max_tokens
    found = []
    for prompt in prompts:
        try:
            ids = encode(llm.codec, prompt.text)
        except InvalidRequest:
            continue
        if 0 < len(ids) <= room:
            # 53 bits: a JSON number holds such a seed exactly
            seed = int.from_bytes(hashlib.sha256(_bytes(prompt)).digest()[:8], "big") >> 11
            found.append(Question(prompt.category or "none", ids, seed))
    if not found:
        raise LoadError(f"None of the {len(prompts)} evaluation prompts fits into the context.")
    return found


def _answers(llm: LLM, questions: Sequence[Question], temperature: float, config: AcceptanceConfig) -> Iterator[Answer]:
    """With two sizes, N and plain decoding, the engine shares out no nodes: each sequence has N nodes in each step."""
    from ..training.distill import first_loop

    size = 1 if config.sequences == 1 else 4 * config.sequences
    for start in range(0, len(questions), size):
        chosen = questions[start : start + size]
        params = [SamplingParams(max_tokens=config.max_tokens, temperature=temperature, seed=q.seed) for q in chosen]
        for question, done in zip(chosen, llm.generate_ids([q.ids for q in chosen], params), strict=True):
            looped = first_loop(done.token_ids) is not None
            yield Answer(question.category, done.completion_tokens, done.steps, done.decode_ms, looped)


def rows_of(answers: Sequence[Answer], nodes: int, temperature: float) -> list[Row]:
    """For each category and for all of them: all answers, then those without loops."""
    rows = []
    for category in (*sorted({answer.category for answer in answers}), "all"):
        chosen = [answer for answer in answers if category in ("all", answer.category)]
        for kind in KINDS:
            kept = [answer for answer in chosen if kind == "all" or not answer.looped]
            row = {"nodes": nodes, "temperature": temperature, "category": category, "kind": kind} | _row(kept)
            if temperature == 0:
                times = [answer.decode_ms / answer.steps for answer in kept if answer.steps]
                row["decode_ms"] = round(statistics.median(times), 3) if times else None
            rows.append(row)
    return rows


def _row(answers: Sequence[Answer]) -> Row:
    tokens, steps = sum(answer.tokens for answer in answers), sum(answer.steps for answer in answers)
    acceptance = round((tokens - len(answers)) / steps, 4) if steps else None
    return {"answers": len(answers), "tokens": tokens, "steps": steps, "acceptance": acceptance}


# ---- files -------------------------------------------------------------------------------------------------------


def _bytes(prompt: Prompt) -> bytes:
    return prompt.text.encode("utf-8", "surrogatepass")


def heads_digest(heads: Path) -> str:
    """Of the tensors, and of config.json, because its calibration chooses the trees. The path alone would not do: other
    heads may be saved there. Without the provenance, which changes no draft."""
    from ..model.drafting.tensors import read_tensors

    found = read_tensors(heads, wanted=lambda name: False)
    config = {name: value for name, value in found.config.items() if name != "provenance"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in found.files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _stored(out: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run left in `out`. Raises LoadError where this run cannot go on from it."""
    check_folder(out)
    if not Path(out).exists():
        return None
    result = read(out, "acceptance")
    if result["options"] != options:
        raise LoadError(f"{out} was measured with {_differing(result['options'], options)}; give another --out.")
    return result


def _differing(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first thing in which they differ: "max_tokens 64, not 128"."""
    name = next(name for name in (*old, *new) if old.get(name) != new.get(name))
    was, now = (str(facts.get(name))[:16] for facts in (old, new))  # the beginning of a digest will do
    return f"{name} {was}, not {now}"


# ---- for a person ------------------------------------------------------------------------------------------------


def table(results: Sequence[dict[str, Any]]) -> str:
    """One block a temperature; a row for each category with all answers and without loops, a column for each N.

    Results of the same engine and options make one table; where two hold the same N, the first one's figure counts.
    """
    first = results[0]
    for other in results[1:]:
        for name in ("options", "engine", "evaluation"):
            if other[name] != first[name]:
                raise LoadError(f"Not measured alike, so not one table: {_differing(first[name], other[name])}.")
    cells: dict[tuple[float, str, str, int], Row] = {}
    for row in (row for result in results for row in result["rows"]):
        cells.setdefault((row["temperature"], row["category"], row["kind"], row["nodes"]), row)
    engine, counts = first["engine"] or {}, first["evaluation"] or {}
    lines = [
        f"{engine.get('heads')} heads, {engine.get('model')} in {engine.get('dtype')} on {first['machine']['device']}, "
        f"{first['machine']['date']}: {counts.get('prompts')} prompts, {counts.get('left_out')} left out, "
        f"{first['options']['sequences']} at once"
    ]
    for temperature in sorted({key[0] for key in cells}):
        lines += ["", *_block({key[1:]: row for key, row in cells.items() if key[0] == temperature}, temperature)]
    return "\n".join(lines)


def _block(cells: dict[tuple[str, str, int], Row], temperature: float) -> list[str]:
    sizes = sorted({nodes for _, _, nodes in cells})
    categories = sorted({category for category, _, _ in cells}, key=lambda category: (category == "all", category))

    def line(category: str, kind: str, show: Callable[[Row], str]) -> str:
        return "".join(f"{show(cells.get((category, kind, nodes), {})):>8}" for nodes in sizes)

    lines = [
        f"{f'tokens per step at T = {temperature:g}':30}" + "".join(f"{nodes:>8}" for nodes in sizes) + "  answers"
    ]
    for category in categories:
        for kind in KINDS:
            count = next(row["answers"] for (c, k, _), row in cells.items() if (c, k) == (category, kind))
            lines.append(f"{category:20}{kind:10}{line(category, kind, _cell)}  {count:7}")
    if temperature == 0:
        lines.append(f"{'ms per step':30}{line('all', 'all', lambda row: _number(row.get('decode_ms')))}")
    return lines


def _cell(row: Row) -> str:
    return _number(row.get("acceptance"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# ---- the command -------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", metavar="FILE", help="one a line, JSONL, or a datasets id")
    parser.add_argument("--nodes", type=numbers(int), metavar="N,…", help="sizes of tree (4,8,16,24,32,64)")
    parser.add_argument("--temperatures", type=numbers(float), metavar="T,…", help="0,0.7 by default")
    parser.add_argument("--per-category", type=int, metavar="N", help="prompts of each at most (25)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (128)")
    parser.add_argument("--sequences", type=int, metavar="N", help="answered at once, each with a full tree (1)")
    parser.add_argument("--out", metavar="FILE", help="kept there as JSON; given again, the run goes on from it")
    parser.add_argument("--show", nargs="+", metavar="FILE", help="only print the tables of such files")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    if options.show:
        given = [name for name in AcceptanceConfig.__dataclass_fields__ if getattr(options, name) is not None]
        if given:
            options.parser.error(f"--show runs nothing, so --{given[0].replace('_', '-')} means nothing")
        print(table([read(path, "acceptance") for path in options.show]))
        return 0
    if options.prompts is None:
        options.parser.error("the following arguments are required: --prompts (or --show)")
    return run_bench(options, "acceptance", AcceptanceConfig, bench_acceptance, lambda result: table([result]))
