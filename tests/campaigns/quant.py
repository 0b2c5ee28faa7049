"""Half precision and NF4 side by side on a GPU: `python -m tests.campaigns quant`. The memory that was planned from the
config against what was taken, and a step's time by nodes: from how many on four-bit weights are not faster."""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass, replace
from typing import Any

from medusa_serve.bench.command import check_numbers, end_options, numbers, run_bench
from medusa_serve.config import DEFAULT_MODEL, MAX_NODES, EngineConfig, check_int
from medusa_serve.errors import InvalidConfig

from .shapes import SHAPES
from .step import RandomStepConfig, bench_random_step

Row = dict[str, Any]
KINDS = ("none", "nf4")
CONTEXT = 2048
RULE = (
    "planned: weights, keys and values from the config alone, the heads as they are, 0.75 GiB for graphs and "
    "activations, and the largest four-bit weight in half precision; measured: the largest that PyTorch reserved "
    "while an engine of one size of tree was built, read a prompt of {length} tokens and made steps, over all sizes. "
    "ms: of a step of one sequence with {length} tokens, as `bench step` measures it. crossover: the fewest nodes from "
    "which on NF4 is not faster."
)


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """nodes: N · length: tokens of the sequence · rounds, steps: as of `bench step` · random: a key of SHAPES"""

    nodes: tuple[int, ...] = (1, 8, 16, 64)
    length: int = 256
    rounds: int = 5
    steps: int = 8
    random: str = "llama-7b"

    def __post_init__(self) -> None:
        check_numbers(self, "nodes", 1, MAX_NODES)
        for name, high in (("length", 2**20), ("rounds", 1000), ("steps", 1000)):
            check_int(self, name, 2 if name == "length" else 1, high)
        if self.random not in SHAPES:
            raise InvalidConfig(f"random must be one of {', '.join(SHAPES)}, not {self.random!r}.", param="random")


def bench_quant(engine: EngineConfig, config: QuantConfig) -> Row:
    """Both kinds in turn. Raises LoadError."""
    from medusa_serve.bench.facts import command, facts
    from medusa_serve.model.loading.process_lock import give_back

    step = RandomStepConfig(
        rows=(1,),
        nodes=tuple(sorted({1, *config.nodes})),
        length=config.length,
        rounds=config.rounds,
        steps=config.steps,
        random=config.random,
    )
    engine, results = replace(engine, max_context=engine.max_context or CONTEXT), {}
    for kind in KINDS:
        gc.collect()
        give_back()  # or the next model lands in blocks of the last one, which are then never freed
        results[kind] = bench_random_step(replace(engine, quantize=kind), step)
    memory = {kind: compared(result, kind, config, engine.max_context or CONTEXT) for kind, result in results.items()}
    names = ("nodes", "length", "rounds", "steps", "random")
    rows = rows_of(results)
    return {
        "kind": "quant",
        "rule": RULE.format(length=config.length),
        "machine": facts(),
        "command": command("tests.campaigns"),
        "options": {name: getattr(config, name) for name in names},
        "engine": {kind: result["engine"] for kind, result in results.items()},
        "floor": {kind: result["floor"] for kind, result in results.items()},
        "memory": memory,
        "rows": rows,
        "crossover": crossover(rows),
    }


def compared(result: Row, kind: str, config: QuantConfig, context: int) -> Row:
    """Bytes by part, and how far the whole is from its plan; nothing where no GPU was measured."""
    from transformers import LlamaConfig

    from medusa_serve.model.loading.gpu_memory import LEAST_REST, SLACK, sizes_of

    cells = [cell for cell in result["memory"] if "peak" in cell]
    if not cells:
        return {}
    most = max(cells, key=lambda cell: cell["peak"])
    sizes = sizes_of(LlamaConfig(**SHAPES[config.random]))
    weights = sizes.weight_bytes("nf4" if kind == "nf4" else "none", 2)
    slab = (context + SLACK) * sizes.column * 2
    planned = weights + most["heads"] + slab + LEAST_REST + sizes.spread_bytes(kind, 2)
    return {
        "planned": {"weights": weights, "all": planned},
        "measured": {
            "weights": most["weights"],
            "all": most["peak"],
            **{n: most[n] for n in ("heads", "slab", "rest")},
        },
        "weights_off": round(weights / most["weights"] - 1, 4),
        "all_off": round(planned / most["peak"] - 1, 4),
    }


def rows_of(results: dict[str, Row]) -> list[Row]:
    """A row for each size of tree, with both kinds' milliseconds."""
    ms = {kind: {row["nodes"]: row["ms"] for row in result["rows"]} for kind, result in results.items()}
    return [
        {
            "nodes": nodes,
            **{f"{kind}_ms": ms[kind][nodes] for kind in KINDS},
            "nf4_over_none": round(ms["nf4"][nodes] / ms["none"][nodes], 3),
        }
        for nodes in sorted(ms["none"])
    ]


def crossover(rows: list[Row]) -> int | None:
    """The fewest nodes from which on NF4 is not faster; None: it is faster at all of them."""
    slower = [row["nf4_over_none"] >= 1 for row in rows]
    first = next((i for i in range(len(rows)) if all(slower[i:])), None)
    return None if first is None else int(rows[first]["nodes"])


def table(result: Row) -> str:
    facts = result["machine"]
    lines = [f"random {result['options']['random']} on {facts['device']}, torch {facts['torch']}, {facts['date']}"]
    lines.append(f"{'nodes':>5}{'half ms':>10}{'nf4 ms':>10}{'nf4/half':>10}")
    for row in result["rows"]:
        lines.append(f"{row['nodes']:5}{row['none_ms']:10.2f}{row['nf4_ms']:10.2f}{row['nf4_over_none']:10.2f}")
    at = result["crossover"]
    lines.append("NF4 is faster at every size" if at is None else f"from {at} nodes on NF4 is not faster")
    for kind, parts in result["memory"].items():
        if parts:
            size = {name: parts[name]["all"] / 2**30 for name in ("planned", "measured")}
            off = f"{parts['all_off']:+.1%} (weights {parts['weights_off']:+.1%})"
            lines.append(f"memory, {kind}: planned {size['planned']:.2f} GiB, measured {size['measured']:.2f}, {off}")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=numbers(int), metavar="N,…", help="sizes of tree (1,8,16,64)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of the sequence (256)")
    parser.add_argument("--rounds", type=int, metavar="N", help="interleaved repetitions; the median counts (5)")
    parser.add_argument("--steps", type=int, metavar="N", help="of a block that is timed (8)")
    parser.add_argument("--random", metavar="SHAPE", help=f"{', '.join(SHAPES)} (llama-7b)")
    parser.add_argument("--slots", type=int, metavar="N", help="(1)")
    parser.add_argument("--max-context", type=int, metavar="N", help="tokens of a slot (what the run needs)")
    end_options(parser, run)


def run(options: argparse.Namespace) -> int:
    if options.model != DEFAULT_MODEL or options.quantize != "auto":
        options.parser.error("the bench makes its own models in half precision and in nf4")
    return run_bench(options, "quant", QuantConfig, bench_quant, table)
