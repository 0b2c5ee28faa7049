"""The model runner: the only code that launches device work. It starts passes, and keeps what the host knows about
each slot."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..config import MAX_NODES
from ..errors import CaptureFailed
from ..types import PrefillChunk, SamplingParams, StepOutput
from .forward.prefill_blocks import BLOCK, Run, pack, rows_for
from .forward.transfer import Started, to_device
from .forward.view import chain_view
from .kernels import StepGraphs, give_up_workers
from .loading.process_lock import TURN, give_back
from .sampling.logprobs import NUM_TOLD, read_logprobs
from .shapes import held_by
from .step import Step
from .tables import FACTS, Admission, Needs
from .timing import Times, Timing

log = logging.getLogger(__name__)
ROW_BUDGET = {"cpu": 16, "cuda": 256}  # rows × nodes of one pass, until step times are measured
TIMED_LENGTH = 192  # tokens of history of the steps that are timed
GRACE_S = 1.0  # without work before it rests: a request that comes during a capture or a compilation waits

# the sequence of a row: its slot, the number of sequences that the slot has had, its num_logprobs
Asker = tuple[int, int, int | None]


class ModelRunner:
    """Implements types.Runner over a Step.

    graphs: captures of its steps, on a GPU · eos_ids, vocab_size, max_context: of the model · expected: tokens per step
    for each N in ascending order
    """

    def __init__(
        self,
        step: Step,
        graphs: StepGraphs | None,
        *,
        prefill_rows: int,
        eos_ids: Sequence[int],
        vocab_size: int,
        max_context: int,
        expected: Sequence[float] = (),
    ) -> None:
        self.step, self._graphs = step, graphs
        self.forward, self.tables, self.drafter = step.forward, step.tables, step.drafter
        self.device = self.tables.history.device
        self.num_slots = self.tables.length.shape[0]
        self.max_context, self.vocab_size = max_context, vocab_size
        self.eos_ids = frozenset(eos_ids)
        self.can_reuse = self.forward.supports_trees
        self.row_budget = ROW_BUDGET[self.device.type]
        self.prefill_rows = prefill_rows
        self.node_choices = tuple(sorted(step.shapes))
        self.has_heads = step.drafter is not None
        self.expected = tuple(expected)
        self._timing = Timing()
        self._compiles = False
        self._held_by = {nodes: held_by(step.shapes, nodes) for nodes in self.node_choices}
        self.overlaps = graphs is not None
        self.grace_s = 0.0 if graphs is None else GRACE_S
        self._host_length = [0] * self.num_slots
        self._owner = [0] * self.num_slots  # how many sequences a slot has had
        self._admitted: list[Admission] = []
        self._prompts: list[list[int]] = [[] for _ in range(self.num_slots)]
        self._poisoned: set[int] = set()

    @property
    def step_ms(self) -> Times:
        return self._timing.step_ms

    @property
    def later_ms(self) -> Times:
        return self._timing.later_ms

    @property
    def activity(self) -> str | None:
        return "compiling" if self._compiles else self._graphs.activity if self._graphs is not None else None

    def plan(self, timing: Timing) -> None:
        """Take the known step times, and the work on them that is left for an idle engine."""
        self._timing = timing

    def admit(self, slot: int, prompt_ids: Sequence[int], params: SamplingParams, limit: int, num_reused: int) -> None:
        self._admitted.append(Admission(slot, prompt_ids, params, limit, num_reused))
        self.tables.note(slot, params)
        self._host_length[slot] = num_reused
        self._prompts[slot] = list(prompt_ids)
        self._owner[slot] += 1

    def step_rows(self, rows: int) -> int:
        """Rows of the step that runs for `rows` rows."""
        return rows if self._graphs is None else self._graphs.rows(rows)

    def _put_admitted(self) -> None:
        """Write all new sequences into the tables at once: as many transfers as for one."""
        if self._admitted:
            self.tables.admit(self._admitted)
            self._admitted = []

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[PrefillChunk]) -> Started[StepOutput | None]:
        self._put_admitted()
        runs = [self._run_of(chunk) for chunk in chunks]
        groups = [runs[i : i + self.prefill_rows] for i in range(0, len(runs), self.prefill_rows)]
        host_slots = [run.slot for run in runs]
        needs = self.tables.needs(host_slots)
        if self.step.in_blocks:
            facts = [self._prefill_packed(group, needs) for group in groups]
        else:
            passes = [self._prefill_pass(group) for group in groups]  # all run before any result is kept
            facts = [self._keep_runs(group, *done, needs) for group, done in zip(groups, passes, strict=True)]
        for run in runs:
            self._host_length[run.slot] += len(run.tokens)
        askers = self._askers(host_slots, needs)

        def read(lines: list[list[int]]) -> list[StepOutput | None]:
            outputs = self._outputs(askers, lines, (), grow=False)
            return [out if run.whole or out.failed else None for out, run in zip(outputs, runs, strict=True)]

        return Started(torch.cat(facts), read)

    def _run_of(self, chunk: PrefillChunk) -> Run:
        start, prompt = self._host_length[chunk.slot], self._prompts[chunk.slot]
        end = start + chunk.count
        return Run(chunk.slot, start, prompt[start:end], end == len(prompt))

    def _prefill_pass(self, runs: Sequence[Run]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the next tokens of several prompts, right-aligned in their rows → logits (B, 1, V), hidden (B, 1, H)."""
        counts = [len(run.tokens) for run in runs]
        scratch = self.tables.history.shape[1] - 1
        slots, starts = [run.slot for run in runs], [run.start for run in runs]
        view = chain_view(slots, starts, counts, self.device, scratch)
        rows = [[0] * (view.num_new - count) + list(run.tokens) for run, count in zip(runs, counts, strict=True)]
        return self.forward.run(to_device(rows, self.device), view, last_only=True)

    def _keep_runs(
        self, runs: Sequence[Run], logits: torch.Tensor, hidden: torch.Tensor | None, needs: Needs
    ) -> torch.Tensor:
        host_slots, complete = [run.slot for run in runs], [int(run.whole) for run in runs]
        lengths = [run.start + len(run.tokens) - run.whole for run in runs]
        slots, length, active = to_device([host_slots, lengths, complete], self.device)
        shape = self.step.shapes[self.first_draft(len(runs))]
        return self.step.first_tokens(slots, length, active, logits, hidden, needs, shape)

    def _prefill_packed(self, runs: Sequence[Run], needs: Needs) -> torch.Tensor:
        assert self._graphs is not None
        rows = rows_for(len(runs), self.prefill_rows)
        blocks = self._graphs.blocks(sum(-(-len(run.tokens) // BLOCK) for run in runs), rows, needs)
        packed = pack(runs, rows, self.num_slots, least=blocks)
        return self._graphs.prefill(packed, needs)[: len(runs)]

    def first_draft(self, prompts: int) -> int:
        return self.step.first_nodes(prompts)

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], nodes: int) -> Started[StepOutput]:
        self._put_admitted()
        host_slots, shape = list(slots), self.step.shapes[nodes]
        lengths = [self._host_length[slot] for slot in host_slots]
        needs = self.tables.needs(host_slots)
        if self._graphs is not None:
            # the step in flight may lengthen a row by a path that the host has not read yet
            facts = self._graphs.run(host_slots, max(lengths) + MAX_NODES + nodes, shape, needs, self.step_ms)
        else:
            rows = torch.tensor(host_slots, device=self.device)
            active = torch.ones_like(rows, dtype=torch.bool)
            try:
                facts = self.step(rows, active, host_slots, lengths, max(lengths) + nodes, shape, needs)
            except BaseException:  # with its old length, each sequence is as it was before the step
                self.tables.length[rows] = torch.tensor(lengths, device=self.device)
                raise
        askers = self._askers(host_slots, needs)
        places = range(len(host_slots)) if self._graphs is None else self._graphs.lines(host_slots)

        def read(lines: list[list[int]]) -> list[StepOutput]:
            mine = [lines[place] for place in places]
            return self._outputs(askers, mine, self._held_by[nodes])

        return Started(facts, read)

    def _askers(self, host_slots: list[int], needs: Needs) -> list[Asker]:
        asked = map(self.tables.num_logprobs, host_slots) if needs.logprobs else [None] * len(host_slots)
        return list(zip(host_slots, map(self._owner.__getitem__, host_slots), asked, strict=True))

    def _outputs(
        self, askers: list[Asker], facts: list[list[int]], holders: Sequence[int], grow: bool = True
    ) -> list[StepOutput]:
        """holders: for each node, the smallest N with a tree that has it · grow: the emitted tokens lengthen the
        sequence (a first token does not: its place was counted before)."""
        outputs, asked = [], any(num is not None for _, _, num in askers)
        depths = (len(facts[0]) - FACTS) // (2 + asked * NUM_TOLD) if facts else 0
        nodes, after = FACTS + depths, FACTS + 2 * depths
        for (slot, owner, num_logprobs), line in zip(askers, facts, strict=True):
            count, finished, finite, drafted, ready = line[:FACTS]
            if not finite:
                self._poison(slot)
                outputs.append(StepOutput(slot, (), drafted, finished=True, failed=True))
                continue
            if grow and owner == self._owner[slot]:  # else another sequence has the slot now
                self._host_length[slot] += count
            held = tuple(map(holders.__getitem__, line[nodes + 1 : nodes + count]))
            logprobs = () if num_logprobs is None else read_logprobs(line[after:], count, num_logprobs)
            kept = tuple(line[FACTS : FACTS + count])
            outputs.append(StepOutput(slot, kept, drafted, bool(finished), False, ready, held, logprobs))
        return outputs

    @torch.inference_mode()
    def time_step(self, rows: int, nodes: int, repeats: int = 3) -> float:
        """Milliseconds of a decode step of the first `rows` slots, the shortest of `repeats`. These slots must be
        free."""
        shape = self.step.shapes[nodes]
        if self._graphs is not None:
            return self._graphs.time(rows, shape, repeats)
        slots, width = torch.arange(rows, device=self.device), TIMED_LENGTH + nodes
        times, lengths = [], self.tables.length[:rows].clone()
        self.tables.length[:rows] = TIMED_LENGTH
        try:
            for _ in range(repeats + 1):
                started = time.perf_counter()
                self.step(slots, slots < 0, list(range(rows)), [TIMED_LENGTH] * rows, width, shape)
                times.append((time.perf_counter() - started) * 1000)
        finally:
            self.tables.length[:rows] = lengths
        return min(times[1:])

    @torch.inference_mode()
    def rest(self) -> bool:
        if self.device.type == "cpu":
            give_up_workers()
        if self._make_faster():
            return True
        if self._graphs is None:
            return False
        timer = self._timing.timer
        try:
            if timer is not None and not timer.turn():
                self._timing = Timing(timer.times)
        except (torch.OutOfMemoryError, CaptureFailed) as error:
            log.warning("Steps are not timed: %s", error)
            self._timing = replace(self._timing, timer=None)
        return self._timing.timer is not None or self._graphs.prepare(self.step.shapes.values())

    def _make_faster(self) -> bool:
        """Do the next part of the work that makes steps faster; → whether there was one."""
        work = self._timing.faster
        if work is None:
            return False
        self._compiles = True
        try:
            with TURN:  # a trace of the model's code would also record another engine's capture
                next(work)
        except StopIteration as end:
            self._timing = end.value or Timing()  # None: an earlier part failed
        finally:
            self._compiles = False
        return True

    @torch.inference_mode()
    def finish(self) -> None:
        """Do all work that makes steps faster now. All slots must be free."""
        while self._make_faster():
            pass

    def drop_captures(self) -> None:
        """Drop all captures, because the passes have changed."""
        if self._graphs is not None:
            self._graphs.drop()

    def _poison(self, slot: int) -> None:
        """NaN in a slot's values gives NaN even where it is masked: zero the slot before it is free again."""
        if self._prompts[slot]:
            self._poisoned.add(slot)
        else:
            self.forward.zero(slot)  # freed while the step ran

    def free(self, slot: int) -> None:
        if slot in self._poisoned or not self.can_reuse:
            self.forward.zero(slot)
            self._poisoned.discard(slot)
        self._admitted = [row for row in self._admitted if row.slot != slot]  # it ended before its first pass
        self._host_length[slot] = 0
        self._prompts[slot] = []

    def reset(self) -> None:
        for slot in range(self.num_slots):
            self._poisoned.add(slot)
            self.free(slot)

    def close(self) -> None:
        self._timing = Timing()  # unfinished work, a generator, closes what it holds
        if self._graphs is not None:
            self._graphs.close()
        self.forward.close()
        self._graphs = None
        del self.step, self.forward, self.tables, self.drafter
        gc.collect()
        if self.device.type == "cuda":
            give_back()
