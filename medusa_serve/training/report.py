"""The report at the end of a training: the serving engine answers held-out prompts with the heads just saved.

This is a measurement, where calibrate.py makes a forecast. The heads are read from their folder and draft a new tree
at each step as they do in the server; lookup is off.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import EngineConfig
from ..engine.batch_manager import BatchManager
from ..errors import MedusaServeError
from ..model.build import Built, build_runner
from ..model.drafting.draft import Drafter
from ..model.drafting.draft_formats import as_served
from ..model.drafting.drafters import drafter_of
from ..model.drafting.files import load_heads
from ..model.kernels import give_up_workers
from ..model.loading.default_model import cache_folder
from ..model.shapes import AUTO_NODES
from ..types import Completion, Delta, SamplingParams
from .calibrate import SAMPLED
from .distill import Job
from .shards import Answers

NODES = 8  # of the smaller tree; the larger one is the largest that a server chooses
PROMPTS, TOKENS = 32, 96  # the most prompts, and tokens of an answer
SLOTS = {"cpu": 1, "cuda": 8}  # answered at once; each has its own tree, so this does not change the acceptance
SECONDS = 20.0  # for both trees; after them no prompt is begun
PATIENCE = 20.0  # seconds more for a tree's last answers, then they are cancelled


@dataclass(frozen=True)
class EngineReport:
    """Acceptance, Σ (completion tokens - 1) / Σ steps, by nodes of the tree. prompts: how many were answered, by nodes.
    Empty if it could not be measured: the training's notes say why."""

    greedy: dict[int, float] = field(default_factory=dict)
    sampled: dict[int, float] = field(default_factory=dict)
    prompts: dict[int, int] = field(default_factory=dict)

    def provenance(self) -> dict[str, Any]:
        """For the provenance of the heads; empty if nothing was measured."""
        if not self.prompts:
            return {}
        named: dict[str, dict[int, Any]] = {
            "engine_greedy": self.greedy,
            f"engine_T{SAMPLED}": self.sampled,
            "engine_prompts": self.prompts,
        }
        return {name: {str(nodes): round(x, 3) for nodes, x in values.items()} for name, values in named.items()}


@contextmanager
def running(
    model: Any,
    config: EngineConfig,
    eos_ids: Collection[int],
    max_positions: int | None,
    drafter: Drafter | None = None,
) -> Iterator[tuple[BatchManager, Built]]:
    """The serving engine without text; afterwards the model has its own attention again."""
    built = build_runner(model, config, eos_ids=sorted(eos_ids), max_positions=max_positions, drafter=drafter)
    manager = BatchManager(built.runner, None, config, model_name=config.model)
    give_up_workers()  # this thread only waits; its workers would slow the engine's
    manager.start()
    try:
        yield manager, built
    finally:
        manager.close()


def engine_report(
    model: Any,
    folder: str | Path,
    answers: Answers,
    held_out: np.ndarray,
    *,
    eos_ids: Collection[int] = (),
    max_positions: int | None = None,
    seconds: float = SECONDS,
) -> tuple[EngineReport, str]:
    """The acceptance of the heads in `folder` when they serve this base, and a sentence that says how or why not.

    Errors of the engine and of memory are not raised: the heads are worth more than a report on them.
    """
    jobs = report_jobs(answers, held_out, max_positions)
    try:
        report = _measure(model, folder, jobs, eos_ids, max_positions, min(seconds, SECONDS))
    except (MedusaServeError, RuntimeError, MemoryError) as error:  # CUDA's errors are RuntimeErrors
        reason = error.message if isinstance(error, MedusaServeError) else f"{type(error).__name__}: {error}"
        return EngineReport(), f"no report through the engine, because it failed: {' '.join(reason.split())[:300]}"
    if not report.prompts:
        return report, "no report through the engine: it decodes this model plainly, or too slowly, or no prompt fits"
    used = ", ".join(f"{count} with {nodes} nodes" for nodes, count in report.prompts.items())
    return report, f"the engine answered held-out prompts, up to {PROMPTS} in the time there was: {used}"


def report_jobs(answers: Answers, held_out: np.ndarray, max_positions: int | None) -> list[Job]:
    """Each prompt greedily and at T = 0.7, with the seed that its answer had; the same prompts for every tree."""
    room = (max_positions or 2**22) - TOKENS
    fitting = [int(number) for number in held_out if 0 < answers.prompt_len[number] <= room]
    return [
        Job(number, int(answers.seed[number]), temperature, tuple(prompt.tolist()))
        for number in fitting[:PROMPTS]
        for prompt in [answers.sequence(number)[: int(answers.prompt_len[number])]]
        for temperature in (0.0, SAMPLED)
    ]


def _measure(
    model: Any,
    folder: str | Path,
    jobs: Sequence[Job],
    eos_ids: Collection[int],
    max_positions: int | None,
    seconds: float,
) -> EngineReport:
    report = EngineReport()
    if not jobs:
        return report
    text, vocab = model.config.get_text_config(), model.get_input_embeddings().num_embeddings
    heads, info = load_heads(
        folder, hidden_size=text.hidden_size, vocab_size=vocab, dtype=model.dtype, device=model.device, base_model=model
    )
    as_served(heads, info, model, cache_folder())
    most, slots = drafter_of(heads, info, "auto").max_nodes + 1, SLOTS[model.device.type]
    context = max(len(job.prompt_ids) for job in jobs) + TOKENS
    sizes = sorted({min(nodes, most) for nodes in (NODES, max(AUTO_NODES[model.device.type]))})
    for left, nodes in zip(range(len(sizes), 0, -1), sizes, strict=True):
        config = EngineConfig(tree=str(nodes), lookup=False, slots=slots, max_context=context, max_queue=slots)
        began = time.monotonic()
        with running(model, config, eos_ids, max_positions, drafter_of(heads, info, "auto")) as (manager, built):
            if nodes not in built.runner.node_choices:  # a model whose attention cannot be replaced
                break
            asked = time.monotonic()
            done = list(_answers(manager, jobs, slots, seconds / left))
            late = time.monotonic() - asked - seconds / left
        seconds = max(0.0, seconds - (time.monotonic() - began))
        for temperature, values in ((0.0, report.greedy), (SAMPLED, report.sampled)):
            these = [completion for job, completion in done if job.temperature == temperature]
            if steps := sum(completion.steps for completion in these):
                values[nodes] = sum(completion.completion_tokens - 1 for completion in these) / steps
        if done:
            report.prompts[nodes] = len({job.prompt for job, _ in done})
        if late > PATIENCE / 4:  # a larger tree would not finish
            break
    return report


def _answers(
    manager: BatchManager, jobs: Sequence[Job], slots: int, seconds: float
) -> Iterator[tuple[Job, Completion]]:
    """Answers as they finish. After `seconds` only jobs of the first prompt are begun; PATIENCE seconds later the
    unfinished answers are cancelled."""
    inbox: queue.SimpleQueue[list[tuple[str, Delta]]] = queue.SimpleQueue()
    began, waiting, open_jobs = time.monotonic(), list(reversed(jobs)), dict[str, Job]()
    try:
        while True:
            late = time.monotonic() - began > seconds and len(waiting) < len(jobs) - 1
            while waiting and len(open_jobs) < slots and not late:
                job = waiting.pop()
                params = SamplingParams(max_tokens=TOKENS, temperature=job.temperature, seed=job.seed)
                open_jobs[manager.submit(job.prompt_ids, params, inbox.put)] = job
            if not open_jobs:
                return
            for sequence_id, delta in inbox.get(timeout=max(0.1, began + seconds + PATIENCE - time.monotonic())):
                if delta.error is not None:
                    raise delta.error
                if delta.completion is not None:
                    yield open_jobs.pop(sequence_id), delta.completion
    except queue.Empty:
        return
    finally:
        for sequence_id in open_jobs:
            manager.cancel(sequence_id)
