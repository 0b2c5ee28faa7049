"""What drafting costs one sequence, as a share of a plain step: `python -m tests.campaigns drafting`.

plain  a step that decodes one token, no heads loaded
draft  the drafter's own call on real hidden states; in its own CUDA graph where the engine uses graphs
step   the engine's whole step with a tree of N nodes: verify, accept, commit, draft

Each is timed in blocks of equal calls, in turn; the median block counts, and figures are ratios of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from medusa_serve.bench.acceptance import heads_path
from medusa_serve.bench.command import end_options, numbers, run_bench
from medusa_serve.bench.step import plain_runner
from medusa_serve.config import MAX_NODES, EngineConfig, check_int
from medusa_serve.errors import InvalidConfig, LoadError
from medusa_serve.types import PrefillChunk, SamplingParams

if TYPE_CHECKING:
    from medusa_serve.model.runner import ModelRunner

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class DraftingConfig:
    """nodes: sizes of tree · draft_vocab: 0 the whole vocabulary, None the heads' own · rounds, of which the first is
    thrown away · calls: of a block"""

    nodes: tuple[int, ...] = (4, 8, 16, 64)
    draft_vocab: int | None = None
    rounds: int = 7
    calls: int = 16

    def __post_init__(self) -> None:
        if not self.nodes or not all(2 <= n <= MAX_NODES for n in self.nodes):
            raise InvalidConfig(f"nodes must be numbers from 2 to {MAX_NODES}.", param="nodes")
        check_int(self, "draft_vocab", 0, 2**31, optional=True)
        check_int(self, "rounds", 1, 1000)
        check_int(self, "calls", 1, 64)  # with the prompt, they must fit into the smallest context


def bench_drafting(engine: EngineConfig, config: DraftingConfig) -> dict[str, Any]:
    """The three times by size of tree. Raises LoadError: no heads, or a tree or vocabulary that they cannot have."""
    from medusa_serve.bench.facts import machine
    from medusa_serve.bench.questions import read_prompts
    from medusa_serve.model.build import build_runner
    from medusa_serve.model.drafting.choose import choose_drafter
    from medusa_serve.model.loading.load import load_model
    from medusa_serve.training.distill import encode

    heads_path(engine)  # raises before a model is loaded
    loaded = load_model(engine)
    drafter, name, _ = choose_drafter(replace(engine, draft_vocab=config.draft_vocab), loaded)
    prompts = [encode(loaded.codec, text) for text in read_prompts().questions[:3]]
    rows = []
    for nodes in config.nodes:
        options = replace(engine, tree=str(nodes), lookup=False, slots=1)
        built = build_runner(
            loaded.model, options, eos_ids=[], max_positions=loaded.max_positions, drafter=drafter
        )  # no end of text: all blocks are of the same length
        try:
            if nodes not in built.runner.node_choices:
                raise LoadError(f"There is nothing to measure: {built.notes[-1]}.")
            rows.append({"nodes": nodes, **measure(built.runner, prompts, nodes, config)})
        finally:
            built.runner.close()
    return {
        "kind": "drafting",
        "machine": machine(),
        "engine": {"model": loaded.name, "heads": name, "device": str(loaded.device), "dtype": loaded.numbers},
        "heads": engine.heads,
        "draft_vocab": drafter.heads.output.vocab_size,
        "depth": drafter.heads.max_depth,
        "rows": rows,
    }


def measure(
    runner: ModelRunner, prompts: Sequence[Sequence[int]], nodes: int, config: DraftingConfig
) -> dict[str, float]:
    """Milliseconds of plain, draft and step for one tree, and the two ratios. The plain runner has the same cache: they
    take turns in slot 0, and the prefill of one overwrites what the other left there."""
    plain = plain_runner(runner)
    drafts = [_draft_call(runner, recorded_draft(runner, prompt)) for prompt in prompts]
    times: dict[str, list[float]] = {"plain": [], "draft": [], "step": []}
    for index in range(config.rounds + 1):
        which = index % len(prompts)
        blocks = {
            "plain": _steps_ms(plain, prompts[which], 1, config.calls),
            "draft": _calls_ms(runner, drafts[which], config.calls),
            "step": _steps_ms(runner, prompts[which], nodes, config.calls),
        }
        for name, value in blocks.items() if index else ():  # the first round warms up and captures
            times[name].append(value)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {f"{name}_ms": round(value, 4) for name, value in median.items()} | {
        "draft_share": round(median["draft"] / median["plain"], 4),
        "step_ratio": round(median["step"] / median["plain"], 4),
    }


class _Recorder:
    """Stands in for the drafter in one step, and keeps what the engine asked it."""

    def __init__(self, drafter: Any) -> None:
        self._drafter, self.max_nodes = drafter, drafter.max_nodes
        self.arguments: tuple[Any, ...] = ()

    def draft(self, *arguments: Any) -> Any:
        self.arguments = arguments
        return self._drafter.draft(*arguments)


def recorded_draft(runner: ModelRunner, prompt: Sequence[int]) -> Call:
    """The drafter's call of the step after this prompt, so that it can be made again."""
    import torch

    drafter: Any = runner.drafter
    recorder: Any = _Recorder(drafter)
    _begin(runner, prompt)
    slot, active = torch.zeros(1, dtype=torch.int64, device=runner.device), torch.ones(1, dtype=torch.bool)
    step = replace(runner.step, drafter=recorder)
    try:
        with torch.inference_mode():  # a step, and never a graph of it: that would own these tensors
            size, shape = len(prompt), step.shapes[runner.node_choices[-1]]
            step(slot, active.to(runner.device), [0], [size], size + shape.num_nodes, shape)
    finally:
        runner.free(0)
    return lambda: drafter.draft(*recorder.arguments)


def _begin(runner: ModelRunner, prompt: Sequence[int]) -> None:
    runner.admit(0, prompt, SamplingParams(seed=0, ignore_eos=True), runner.max_context, 0)
    runner.prefill([PrefillChunk(0, len(prompt))]).outputs()


def _draft_call(runner: ModelRunner, call: Call) -> Call:
    """The call as the engine makes it: a replay where it replays its steps."""
    import torch

    if not runner.overlaps:
        return torch.inference_mode()(call)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
    return graph.replay


def _calls_ms(runner: ModelRunner, call: Call, count: int) -> float:
    """Milliseconds of one of `count` calls; one before them is not timed."""
    import torch

    def wait() -> None:
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)

    call()
    wait()
    started = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return (time.perf_counter() - started) / count * 1000


def _steps_ms(runner: ModelRunner, prompt: Sequence[int], nodes: int, count: int) -> float:
    """The same of decode steps, read as the engine reads them: one step late where the device runs ahead."""
    _begin(runner, prompt)
    runner.decode([0], nodes).outputs()
    in_flight: deque[Any] = deque()
    started = time.perf_counter()
    for _ in range(count):
        in_flight.append(runner.decode([0], nodes))
        if len(in_flight) > runner.overlaps:
            in_flight.popleft().outputs()
    while in_flight:
        in_flight.popleft().outputs()
    took = time.perf_counter() - started
    runner.free(0)
    return took / count * 1000


# ---- the command -------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    engine, facts = result["engine"], result["machine"]
    lines = [
        f"{engine['heads']} heads of depth {result['depth']} over {result['draft_vocab']} tokens, {engine['model']} in "
        f"{engine['dtype']} on {facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}",
        f"{'nodes':>5}{'plain ms':>10}{'draft ms':>10}{'step ms':>10}{'draft/plain':>13}{'step/plain':>12}",
    ]
    for row in result["rows"]:
        times = "".join(f"{row[name + '_ms']:10.3f}" for name in ("plain", "draft", "step"))
        lines.append(f"{row['nodes']:5}{times}{row['draft_share']:13.3f}{row['step_ratio']:12.3f}")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=numbers(int), metavar="N,…", help="sizes of tree (4,8,16,64)")
    parser.add_argument("--draft-vocab", type=int, metavar="N", help="tokens to draft from; 0: all (the heads' own)")
    parser.add_argument("--rounds", type=int, metavar="N", help="interleaved repetitions; the median counts (7)")
    end_options(parser, run)


def run(options: argparse.Namespace) -> int:
    return run_bench(options, "drafting", DraftingConfig, bench_drafting, table)
