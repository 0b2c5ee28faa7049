"""t(B, N), the time of a decode step of B sequences with trees of N nodes, and the time in which this machine reads the
model's weights: `medusa-serve bench step`.

A step is what the engine runs: verify, accept, commit, and draft for the next one. Its outputs are read as the engine
reads them, one step late where the device runs ahead. N = 1 is plain decoding by a runner without a drafter. The tokens
before the step are not computed: whatever the cache holds is read, at the same cost.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import MAX_NODES, EngineConfig, check_int
from ..errors import InvalidConfig, LoadError
from ..types import PrefillChunk, SamplingParams, StepOutput
from .command import check_numbers, end_options, numbers, run_bench
from .floor import forget_peak, memory_of, read_bytes, read_rates
from .plot import step_table

if TYPE_CHECKING:
    from ..model.loading.load import LoadedModel
    from ..model.runner import ModelRunner

Row = dict[str, Any]
FIXED_DEPTH, FIXED_RANKS = 5, 10  # of the drafts for a model without heads
ATTENTION = ("auto", "sdpa")
RULE = (
    "ms: of a step with `batch` sequences of {length} tokens each, by the clock, in blocks of {steps}. device_ms: "
    "between CUDA events around it. Blocks in turn, the median of {rounds} rounds, what comes first thrown away. "
    "to_floor: ms over the floor, the bytes of the weights that a step reads (not the cache) over the median rate of "
    "long reads in the same run. to_plain: ms over that of one node, in the same rounds. "
    "sampled_to_greedy: of the same step with all rows sampled, likewise."
)


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """rows: B, sequences of a step · nodes: N, 1 is measured in any case · length: tokens of each sequence ·
    rounds, after one that warms up · steps: of a block · temperature: above 0, the same steps also with rows sampled
    at it and top_p 0.9 · attention: auto, or sdpa: what a GPU takes for which Triton has no kernels, as a T4"""

    rows: tuple[int, ...] = (1, 2, 4, 8)
    nodes: tuple[int, ...] = (1, 4, 8, 16, 64)
    length: int = 256
    rounds: int = 5
    steps: int = 8
    temperature: float = 0.0
    attention: str = "auto"

    def __post_init__(self) -> None:
        check_numbers(self, "rows", 1, 1024)
        check_numbers(self, "nodes", 1, MAX_NODES)
        check_int(self, "length", 2, 2**20)
        check_int(self, "rounds", 1, 1000)
        check_int(self, "steps", 1, 1000)
        if not 0 <= self.temperature <= 100:  # not a number is neither
            raise InvalidConfig("temperature must be a number from 0 to 100.", param="temperature")
        if self.attention not in ATTENTION:
            raise InvalidConfig(f"attention must be one of {', '.join(ATTENTION)}.", param="attention")


class Block(NamedTuple):
    """Milliseconds of a step, and of a plain one of as many sequences in the same round. device_ms: None on a CPU ·
    sampled_ms: of a step with sampled rows"""

    batch: int
    nodes: int
    ms: float
    device_ms: float | None
    plain_ms: float
    sampled_ms: float | None = None


class Subject(NamedTuple):
    """What is measured. heads: what they are called"""

    loaded: LoadedModel
    drafter: Any
    heads: str


# ---- the run -----------------------------------------------------------------------------------------------------


def bench_step(engine: EngineConfig, config: StepConfig, subject: Subject | None = None) -> dict[str, Any]:
    """All cells with the floor. subject: instead of the engine's model and heads. Raises LoadError: what cannot be
    loaded or does not fit, trees that cannot be filled."""
    from .facts import command, facts

    loaded, drafter, heads = subject or _loaded(engine)
    reads, blocks, memory = read_rates(loaded.device), list[Block](), list[Row]()
    for nodes in [n for n in sorted(config.nodes) if n > 1] or [1]:
        forget_peak(loaded.device)
        row, found = _cells(loaded, engine, config, nodes, drafter)
        memory += [row]
        blocks += found
        reads += read_rates(loaded.device)
    size, rate = read_bytes(loaded.model), statistics.median(reads)
    floor = {"weight_bytes": size, "bytes_per_second": round(rate), "ms": size / rate * 1000}
    names = ("length", "rounds", "steps", "temperature", "attention")
    options = {name: getattr(config, name) for name in names}
    return {
        "kind": "step",
        "rule": RULE.format(**options),
        "machine": facts(),
        "command": command(),
        "engine": {"model": loaded.name, "heads": heads, "device": str(loaded.device), "dtype": loaded.numbers},
        "options": options,
        "floor": floor | {"ms": round(floor["ms"], 4)},
        "memory": memory,
        "rows": rows_of(blocks, floor["ms"]),
    }


def _cells(
    loaded: LoadedModel, engine: EngineConfig, config: StepConfig, nodes: int, drafter: Any
) -> tuple[Row, list[Block]]:
    """A runner's memory, and its steps with trees of `nodes` and without. The runner is closed, so that the next one's
    memory can be measured."""
    from ..model.build import build_runner
    from ..model.torch_kernels import TorchKernels

    plan, kernels = _plan(engine, config, nodes, drafter), TorchKernels() if config.attention == "sdpa" else None
    built = build_runner(
        loaded.model, plan, eos_ids=[], max_positions=loaded.max_positions, drafter=copy.copy(drafter), kernels=kernels
    )
    try:
        if nodes not in built.runner.node_choices:
            raise LoadError(f"There is nothing to measure: {built.notes[-1]}.")
        read_prompt(built.runner, config.length)
        step_ms(built.runner, max(config.rows), nodes, config)
        memory = {"nodes": nodes, **memory_of(loaded.model, built.runner)}  # before there is a second runner
        return memory, measure(built.runner, nodes, config)
    finally:
        built.runner.close()


def _plan(engine: EngineConfig, config: StepConfig, nodes: int, drafter: Any) -> EngineConfig:
    """As many slots as are needed, with room for a block in which every draft is accepted."""
    deepest = min(nodes - 1, drafter.max_depth)
    room = config.length + 2 + (config.steps + 1) * (1 + deepest)
    context = max(room, engine.max_context or 0)
    tree = "off" if nodes == 1 else str(nodes)
    return replace(engine, tree=tree, lookup=False, slots=max(config.rows), max_context=context)


def _loaded(engine: EngineConfig) -> Subject:
    from ..model.drafting.choose import choose_drafter
    from ..model.loading.load import load_model

    loaded = load_model(engine)
    drafter, name, _ = choose_drafter(engine, loaded)
    return Subject(loaded, drafter or fixed_drafter(), name)


def fixed_drafter() -> Any:
    """Drafts the same tokens in a tree of the same form at every step: trees of N nodes without heads."""
    import torch

    from medusa_serve.model.drafting.draft import StaticDrafter
    from medusa_serve.model.drafting.tree import most_probable

    class FixedDrafter(StaticDrafter):
        def candidates(self, slots: Any, hidden: Any, pending: Any, length: Any, sampling: Any) -> Any:
            ranks = torch.arange(self.num_ranks, device=pending.device)
            return ranks.expand(len(slots), self.num_heads, -1)

    ranks = [[0.6 * 0.5**rank for rank in range(FIXED_RANKS)]] * FIXED_DEPTH
    return FixedDrafter(FIXED_DEPTH, FIXED_RANKS, most_probable(ranks, MAX_NODES))


def measure(runner: ModelRunner, nodes: int, config: StepConfig) -> list[Block]:
    """Blocks of every number of rows, plain and with trees of `nodes` in turn."""
    runners = {1: plain_runner(runner), nodes: runner}  # one, if that is the plain one
    found = []
    for index in range(config.rounds + 1):
        for batch in sorted(config.rows):
            times = {n: step_ms(one, batch, n, config) for n, one in runners.items()}
            hot: dict[int, float] = {}
            if config.temperature:
                hot = {n: step_ms(one, batch, n, config, config.temperature)[0] for n, one in runners.items()}
            if index:  # the first round warms up and captures
                found += [Block(batch, n, *each, times[1][0], hot.get(n)) for n, each in times.items()]
    return found


def plain_runner(runner: ModelRunner) -> ModelRunner:
    """A runner without heads over the same model and cache; they take turns in the same slots."""
    from ..model.build import runner_of
    from ..model.shapes import Shape
    from ..model.tables import SlotTables

    slots, columns = runner.tables.history.shape
    tables = SlotTables(slots, columns, [], 0, 0, runner.device)
    sizes: Any = {"vocab_size": runner.vocab_size, "max_context": runner.max_context}
    shapes = {1: Shape(1, 0, 0)}
    return runner_of(runner.forward, tables, runner.step.kernels, shapes=shapes, drafter=None, eos_ids=[], **sizes)


def read_prompt(runner: ModelRunner, length: int) -> None:
    """A prompt of `length` tokens in one pass."""
    runner.admit(0, _prompt(runner, 0, length), SamplingParams(seed=0), runner.max_context, 0)
    runner.prefill([PrefillChunk(0, length)]).outputs()
    runner.free(0)


def _prompt(runner: ModelRunner, slot: int, length: int) -> list[int]:
    return [(31 * slot + 7 * index) % runner.vocab_size for index in range(length)]


def step_ms(
    runner: ModelRunner, batch: int, nodes: int, config: StepConfig, temperature: float = 0.0
) -> tuple[float, float | None]:
    """Milliseconds of a step: by the clock, and between CUDA events around each call (median)."""
    import torch

    slots = list(range(batch))
    params = SamplingParams(seed=0, ignore_eos=True, temperature=temperature, top_p=0.9 if temperature else 1.0)
    for slot in slots:
        prompt = _prompt(runner, slot, config.length)
        runner.admit(slot, prompt, params, runner.max_context, config.length - 1)  # of any content
    runner.prefill([PrefillChunk(slot, 1) for slot in slots]).outputs()
    runner.decode(slots, nodes).outputs()
    in_flight, last = deque[Any](), list[StepOutput]()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * config.steps * runner.overlaps)]
    started = time.perf_counter()
    for number in range(config.steps):
        for event in events[2 * number : 2 * number + 1]:
            event.record()
        in_flight.append(runner.decode(slots, nodes))
        for event in events[2 * number + 1 : 2 * number + 2]:
            event.record()
        if len(in_flight) > runner.overlaps:
            last = in_flight.popleft().outputs()
    while in_flight:
        last = in_flight.popleft().outputs()
    took = (time.perf_counter() - started) / config.steps * 1000
    for slot in slots:
        runner.free(slot)
    if any(out.failed or out.finished for out in last):
        raise LoadError("The model gave no finite numbers, or a sequence ended, so that steps were not whole.")
    pairs = zip(events[::2], events[1::2], strict=True)
    return took, statistics.median(a.elapsed_time(b) for a, b in pairs) if events else None


def rows_of(blocks: Sequence[Block], floor_ms: float) -> list[Row]:
    """A row for each B and N, with medians over the rounds."""
    rows = []
    for batch, nodes in sorted({block[:2] for block in blocks}):
        mine = [block for block in blocks if block[:2] == (batch, nodes)]
        ms = statistics.median(block.ms for block in mine)
        device = [block.device_ms for block in mine if block.device_ms is not None]
        hot = [block.sampled_ms / block.ms for block in mine if block.sampled_ms is not None]
        rows.append(
            {
                "batch": batch,
                "nodes": nodes,
                "ms": round(ms, 4),
                "device_ms": round(statistics.median(device), 4) if device else None,
                "to_floor": round(ms / floor_ms, 4),
                "to_plain": round(statistics.median(block.ms / block.plain_ms for block in mine), 4),
                "sampled_to_greedy": round(statistics.median(hot), 4) if hot else None,
            }
        )
    return rows


# ---- the command -------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", type=numbers(int), metavar="B,…", help="sequences of a step (1,2,4,8)")
    add("--nodes", type=numbers(int), metavar="N,…", help="sizes of tree; 1 is plain decoding (1,4,8,16,64)")
    add("--length", type=int, metavar="N", help="tokens of each sequence (256)")
    add("--rounds", type=int, metavar="N", help="interleaved repetitions; the median counts (5)")
    add("--steps", type=int, metavar="N", help="of a block that is timed (8)")
    add("--temperature", type=float, metavar="T", help="also with all rows sampled at T, top_p 0.9")
    add("--attention", choices=ATTENTION, help="sdpa: as on a GPU for which Triton has no kernels (auto)")
    add("--max-context", type=int, metavar="N", help="tokens of a slot (what the run needs)")
    end_options(parser, run)


def run(options: argparse.Namespace) -> int:
    return run_bench(options, "step", StepConfig, bench_step, step_table)
