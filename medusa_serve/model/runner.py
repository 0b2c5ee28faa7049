"""The model runner: the only code that launches device work. One step for everything; a tree of one node is plain
decoding."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..config import MAX_NODES
from ..types import PrefillChunk, SamplingParams, StepOutput
from .cpu.workers import give_up_workers
from .drafting.draft import Drafter
from .drafting.lookup import lookup
from .drafting.tree import assemble
from .forward.attention import View, chain_view, has_numba, tree_view
from .forward.plain_forward import PlainForward
from .forward.prefill_blocks import BLOCK, FEW, Packed, Run, block_view, pack, rows_for
from .forward.tree_forward import TreeForward
from .gpu.capture import TURN, CaptureFailed, give_back, settle
from .gpu.graphs import StepGraphs
from .sampling.accept import Limits, Walk, accept, ended, pick_all
from .sampling.filters import Sampling
from .sampling.logprobs import NUM_TOLD, read_logprobs
from .shapes import Shape, heads_fill, held_by
from .tables import FACTS, PLAIN, Admission, Needs, SlotTables
from .transfer import Started, to_device

if TYPE_CHECKING:
    from .timing import StepTimer

log = logging.getLogger(__name__)
ROW_BUDGET = {"cpu": 16, "cuda": 256}  # rows × nodes of one pass, until step times are measured
TIMED_LENGTH = 192  # tokens of history of the steps that are timed
GRACE_S = 1.0  # without work before it rests: a capture or a compiler keeps whoever comes next waiting
PREFILL_ROWS = {"cpu": 1, "cuda": 64}  # prompts of one prefill pass; a CPU is busy with one


def _step_kernels(fused: bool, device: torch.device, forward: Any) -> Any:
    """What stands around a step's pass, a module; None: torch's operations."""
    if fused:
        from .gpu import step as fused_step

        return fused_step
    if device.type == "cpu" and has_numba() and forward.supports_trees:
        from .cpu import step as native_tables

        return native_tables
    return None


# whose a row of a pass was: its slot, that slot's how many-th sequence, and for how many log-probabilities it asked
Asker = tuple[int, int, int | None]


class ModelRunner:
    """Implements types.Runner over a TreeForward or a PlainForward.

    shapes: of a step, by node count, 1 among them · drafter: None drafts from the lookup alone
    """

    def __init__(
        self,
        forward: TreeForward | PlainForward,
        tables: SlotTables,
        *,
        shapes: dict[int, Shape],
        drafter: Drafter | None,
        eos_ids: Sequence[int],
        vocab_size: int,
        max_context: int,
        expected: Sequence[float] = (),
    ) -> None:
        """expected: tokens per step of each N, ascending"""
        self.forward, self.tables, self.drafter = forward, tables, drafter
        self.device = tables.history.device
        self.num_slots = tables.length.shape[0]
        self.max_context, self.vocab_size = max_context, vocab_size
        self.eos_ids = frozenset(eos_ids)
        self.can_reuse = forward.supports_trees
        self.activity: str | None = None
        self.row_budget = ROW_BUDGET[self.device.type]
        self.prefill_rows = min(self.num_slots, PREFILL_ROWS[self.device.type]) if forward.supports_trees else 1
        self._shapes = shapes
        self.node_choices = tuple(sorted(shapes))
        self.has_heads = drafter is not None
        self.expected = tuple(expected)
        self.step_ms: Mapping[tuple[int, int], float] = {}
        self.later: Iterator[None] | None = None  # what makes steps faster and takes seconds, for an idle engine
        self.later_ms: Mapping[tuple[int, int], float] = {}  # of steps after that, where an earlier start measured them
        self.to_time: StepTimer | None = None  # behind that
        self._held_by = {nodes: held_by(shapes, nodes) for nodes in self.node_choices}
        self._graphs = StepGraphs(self) if self.device.type == "cuda" and forward.can_capture else None
        self._packs_prefill = self._graphs is not None and self._graphs.packs
        self.overlaps = self._graphs is not None
        self._packs = self.overlaps or getattr(forward, "packs", False)
        self.grace_s = 0.0 if self._graphs is None else GRACE_S
        self._kernels = _step_kernels(self._packs_prefill, self.device, forward)
        self._host_length = [0] * self.num_slots
        self._owner = [0] * self.num_slots  # how many sequences a slot has had
        self._admitted: list[Admission] = []
        self._prompts: list[list[int]] = [[] for _ in range(self.num_slots)]
        self._poisoned: set[int] = set()

    def admit(self, slot: int, prompt_ids: Sequence[int], params: SamplingParams, limit: int, num_reused: int) -> None:
        self._admitted.append(Admission(slot, prompt_ids, params, limit, num_reused))
        self.tables.note(slot, params)
        self._host_length[slot] = num_reused
        self._prompts[slot] = list(prompt_ids)
        self._owner[slot] += 1

    def step_rows(self, rows: int) -> int:
        """Rows of the step that is made for so many."""
        return rows if self._graphs is None else self._graphs.rows(rows)

    def _put_admitted(self) -> None:
        """Newcomers enter the tables together: one transfer, however many they are."""
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
        if self._packs_prefill:
            facts = [self._prefill_packed(group, needs) for group in groups]
        else:
            passes = [self._prefill_pass(group) for group in groups]  # all of them before anything is kept
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
        """The next tokens of several prompts, at the right end of their rows → logits (B, 1, V), hidden (B, 1, H)."""
        counts = [len(run.tokens) for run in runs]
        scratch = self.tables.history.shape[1] - 1
        slots, starts = [run.slot for run in runs], [run.start for run in runs]
        view = chain_view(slots, starts, counts, self.device, scratch)
        rows = [[0] * (view.num_new - count) + list(run.tokens) for run, count in zip(runs, counts, strict=True)]
        return self.forward.run(to_device(rows, self.device), view, last_only=True)

    def _keep_runs(
        self, runs: Sequence[Run], logits: torch.Tensor, hidden: torch.Tensor | None, needs: Needs
    ) -> torch.Tensor:
        host_slots, whole = [run.slot for run in runs], [int(run.whole) for run in runs]
        lengths = [run.start + len(run.tokens) - run.whole for run in runs]
        slots, length, active = to_device([host_slots, lengths, whole], self.device)
        nodes = self.first_draft(len(runs))
        return self._first_tokens(slots, length, active, logits, hidden, needs, nodes)

    def _prefill_packed(self, runs: Sequence[Run], needs: Needs) -> torch.Tensor:
        assert self._graphs is not None
        rows = rows_for(len(runs), self.prefill_rows)
        blocks = self._graphs.blocks(sum(-(-len(run.tokens) // BLOCK) for run in runs), rows, needs)
        packed = pack(runs, rows, self.num_slots, least=blocks)
        return self._graphs.prefill(packed, needs)[: len(runs)]

    def first_draft(self, prompts: int) -> int:
        few = not self._packs_prefill or prompts <= FEW
        return self.node_choices[-1 if few else min(1, len(self.node_choices) - 1)]

    def prefill_step(self, packed: Packed, width: int, needs: Needs) -> torch.Tensor:
        """A packed prefill pass, device work alone; → facts of its R rows as of `step`."""
        blocks, columns = len(packed.slots), self.tables.history.shape[1]
        view = block_view(packed, columns, [0] * blocks, [0] * blocks, width)
        assert isinstance(self.forward, TreeForward)
        logits, hidden = self.forward.run_packed(packed.tokens, view, packed.last)
        nodes = self.first_draft(len(packed.rows))
        return self._first_tokens(packed.rows, packed.lengths, packed.whole, logits, hidden, needs, nodes)

    def _first_tokens(
        self,
        slots: torch.Tensor,
        length: torch.Tensor,
        whole: torch.Tensor,
        logits: torch.Tensor,
        hidden: torch.Tensor | None,
        needs: Needs,
        nodes: int,
    ) -> torch.Tensor:
        """Where a prompt is complete, its last token is the root of a tree of one: the walk emits the first token.
        length -1: the row stays as it is · nodes: N of the tree that is drafted for"""
        tables = self.tables
        tables.length[slots] = torch.where(length >= 0, length, tables.length[slots])
        draft = assemble(
            tables.pending(slots), tables.head_nodes(slots), tables.lookup[slots], tables.node_limit[slots], 1, 0, 0
        )
        sampling = tables.sampling(slots, needs)
        walk = accept(logits, draft, 0, sampling, tables.limits(slots))
        return self._keep(slots, whole.bool(), walk, hidden, torch.zeros_like(slots), sampling, self._shapes[nodes])

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], nodes: int) -> Started[StepOutput]:
        self._put_admitted()
        host_slots, shape = list(slots), self._shapes[nodes]
        lengths = [self._host_length[slot] for slot in host_slots]
        needs = self.tables.needs(host_slots)
        if self._graphs is not None:
            # the step in flight may have added a tree to what the host knows
            facts = self._graphs.run(host_slots, max(lengths) + MAX_NODES + nodes, shape, needs)
        else:
            rows = torch.tensor(host_slots, device=self.device)
            active = torch.ones_like(rows, dtype=torch.bool)
            try:
                facts = self.step(rows, active, host_slots, lengths, max(lengths) + nodes, shape, needs)
            except BaseException:  # the draft comes last: what raises leaves every sequence as it was
                self.tables.length[rows] = torch.tensor(lengths, device=self.device)
                raise
        askers = self._askers(host_slots, needs)
        places = range(len(host_slots)) if self._graphs is None else self._graphs.lines(host_slots)

        def read(lines: list[list[int]]) -> list[StepOutput]:
            mine = [lines[place] for place in places]
            return self._outputs(askers, mine, self._held_by[nodes])

        return Started(facts, read)

    def step(
        self,
        slots: torch.Tensor,
        active: torch.Tensor,
        host_slots: list[int],
        host_length: list[int],
        width: int,
        shape: Shape,
        needs: Needs = PLAIN,
    ) -> torch.Tensor:
        """Draft, verify, accept, commit, draft for the next step: device work alone, no wait for it.

        slots (B) · active (B): rows that count; the others only fill the batch · width: columns of keys to read
        → (B, 5 + 2 (D + 1)): tokens kept, finished, finite, drafted, ready for the next step, the tokens, their nodes;
        with log-probabilities NUM_TOLD (D + 1) more, as of Walk
        """
        simple = not (needs.penalised or needs.logprobs or (needs.sampled and self.device.type == "cpu"))
        if simple and self._kernels is not None:
            return self._fused_step(slots, active, host_slots, host_length, width, shape, needs)
        tables = self.tables
        limits: Limits = tables.limits(slots)
        active = active & ~ended(tables.pending(slots), limits)  # the host, a step behind, may not know yet
        draft = assemble(
            tables.pending(slots), tables.head_nodes(slots), tables.lookup[slots], tables.node_limit[slots], *shape
        )
        view = tree_view(slots, limits.length, host_slots, host_length, draft, width, packed=self._packs)
        logits, hidden = self.forward.run(draft.tokens, view)
        sampling = tables.sampling(slots, needs)
        walk = accept(logits, draft, shape.max_depth, sampling, limits)
        self.forward.commit(view, walk.nodes)
        drafted = (draft.tokens[:, 1:] >= 0).sum(dim=1)
        return self._keep(slots, active, walk, hidden, drafted, sampling, shape)

    def _fused_step(
        self,
        slots: torch.Tensor,
        active: torch.Tensor,
        host_slots: list[int],
        host_length: list[int],
        width: int,
        shape: Shape,
        needs: Needs,
    ) -> torch.Tensor:
        """`step` by the kernels of fused_step.py or native_tables.py, without penalties and log-probabilities."""
        tables, forward, kernels = self.tables, self.forward, self._kernels
        opened = kernels.open_step(tables, slots, active, shape)
        places = (opened.positions, opened.columns)
        view = View(
            slots, opened.length, host_slots, host_length, *places, None, width,
            packed=self._packs, node_bits=opened.bits,
        )  # fmt: skip
        logits, hidden = forward.run(opened.tokens, view)
        sampling = tables.sampling(slots, needs) if needs.sampled else tables.greedy(len(slots))
        picked, best = pick_all(logits, sampling, opened.positions + 1)
        rest = self.drafter is not None and shape.num_nodes == 1
        closed = kernels.close_step(tables, slots, opened, picked, best, shape.max_depth, rest=rest)
        forward.commit(view, closed.nodes)
        if self.drafter is not None and hidden is not None and not rest:
            at = hidden[torch.arange(slots.shape[0], device=slots.device), closed.last]
            nodes = heads_fill(shape, self.drafter.max_nodes)
            heads = self.drafter.draft(slots, at, closed.pending, closed.length, sampling, nodes)
            kernels.keep_heads(tables, slots, opened.active, heads, closed.facts, self.node_choices[-1] - 1)
        return closed.facts

    def _keep(
        self,
        slots: torch.Tensor,
        active: torch.Tensor,
        walk: Walk,
        hidden: torch.Tensor | None,
        drafted: torch.Tensor,
        sampling: Sampling,
        shape: Shape,
    ) -> torch.Tensor:
        """Advance the tables and draft for the next step, which will likely have the same shape; → the step's facts."""
        count = self.tables.advance(slots, active, walk)
        ready = self._draft_next(slots, active, walk, hidden, sampling, shape)
        facts = torch.stack([count, walk.finished, walk.finite, drafted, ready], dim=1)
        told = [] if walk.logprobs is None else [walk.logprobs.flatten(1)]
        return torch.cat([facts, walk.tokens, walk.nodes, *told], dim=1)

    def _draft_next(
        self,
        slots: torch.Tensor,
        active: torch.Tensor,
        walk: Walk,
        hidden: torch.Tensor | None,
        sampling: Sampling,
        shape: Shape,
    ) -> torch.Tensor:
        """Heads (on the last accepted node only) and lookup for the next tree; → (B) draft tokens at hand.

        Behind a plain step the heads rest, and what they drafted before is void."""
        tables, ready = self.tables, torch.zeros_like(slots)
        length, heads = tables.length[slots], None
        if self.drafter is not None and shape.num_nodes == 1:
            tables.heads.tokens[slots] = torch.where(active[:, None], -1, tables.heads.tokens[slots])
            tables.lookup[slots] = torch.where(active[:, None], -1, tables.lookup[slots])
            return ready
        if self.drafter is not None and hidden is not None:
            last = walk.nodes.gather(1, (walk.num_emitted - 1).clamp(min=0)[:, None])[:, 0]
            at = hidden[torch.arange(slots.shape[0], device=slots.device), last]
            nodes = heads_fill(shape, self.drafter.max_nodes)
            heads = self.drafter.draft(slots, at, tables.pending(slots), length, sampling, nodes)
            ready = (heads.tokens >= 0).any(dim=1) * (self.node_choices[-1] - 1)
        found = lookup(tables.history[slots], length, tables.lookup.shape[1])
        ready = torch.maximum(ready, (found >= 0).sum(dim=1))
        tables.keep_draft(slots, active, heads, found)
        return ready

    def _askers(self, host_slots: list[int], needs: Needs) -> list[Asker]:
        told = map(self.tables.num_logprobs, host_slots) if needs.logprobs else [None] * len(host_slots)
        return list(zip(host_slots, map(self._owner.__getitem__, host_slots), told, strict=True))

    def _outputs(
        self, askers: list[Asker], facts: list[list[int]], holders: Sequence[int], grow: bool = True
    ) -> list[StepOutput]:
        """holders: of each node, the smallest N that has it · grow: what was emitted lengthens the sequence (a first
        token does not: its place was counted before)."""
        outputs, told = [], any(num is not None for _, _, num in askers)
        depths = (len(facts[0]) - FACTS) // (2 + told * NUM_TOLD) if facts else 0
        nodes, spoken = FACTS + depths, FACTS + 2 * depths
        for (slot, owner, num_logprobs), line in zip(askers, facts, strict=True):
            count, finished, finite, drafted, ready = line[:FACTS]
            if not finite:
                self._poison(slot)
                outputs.append(StepOutput(slot, (), drafted, finished=True, failed=True))
                continue
            if grow and owner == self._owner[slot]:  # else the slot was given to another sequence meanwhile
                self._host_length[slot] += count
            held = tuple(map(holders.__getitem__, line[nodes + 1 : nodes + count]))
            logprobs = () if num_logprobs is None else read_logprobs(line[spoken:], count, num_logprobs)
            kept = tuple(line[FACTS : FACTS + count])
            outputs.append(StepOutput(slot, kept, drafted, bool(finished), False, ready, held, logprobs))
        return outputs

    @torch.inference_mode()
    def time_step(self, rows: int, nodes: int, repeats: int = 3) -> float:
        """Milliseconds of a decode step of the first `rows` slots, the least of some repeats. Before serving only: the
        slots must be free."""
        shape = self._shapes[nodes]
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
        if self._do_later():
            return True
        if self._graphs is None:
            return False
        try:
            if self.to_time is not None and not self.to_time.turn():
                self.to_time = None
        except (torch.OutOfMemoryError, CaptureFailed) as error:
            log.warning("Steps are not timed: %s", error)
            self.to_time = None
        return self.to_time is not None or self._graphs.prepare(self._shapes.values())

    def _do_later(self) -> bool:
        """The next part of it; → whether there was one."""
        if self.later is None:
            return False
        self.activity = "compiling"
        try:
            with TURN:  # what traces a model's code also sees the calls of another engine's capture
                if next(self.later, self) is self:
                    self.later = None
        finally:
            self.activity = None
        return True

    @torch.inference_mode()
    def finish(self) -> None:
        """All that is left for later, now. All slots must be free."""
        while self._do_later():
            pass

    def drop_captures(self) -> None:
        """The passes are no longer what was captured of them."""
        if self._graphs is not None:
            self._graphs.drop()

    def _poison(self, slot: int) -> None:
        """Masked NaN rows of V would still give NaN: such a slot is zeroed before it rests or serves again."""
        if self._prompts[slot]:
            self._poisoned.add(slot)
        else:
            self.forward.zero(slot)  # freed while the step was under way

    def free(self, slot: int) -> None:
        if slot in self._poisoned or not self.can_reuse:
            self.forward.zero(slot)
            self._poisoned.discard(slot)
        self._admitted = [row for row in self._admitted if row.slot != slot]  # ended before its first pass
        self._host_length[slot] = 0
        self._prompts[slot] = []

    def reset(self) -> None:
        for slot in range(self.num_slots):
            self._poisoned.add(slot)
            self.free(slot)

    def close(self) -> None:
        self.later = None  # where it has begun, it closes what it holds
        if self._graphs is not None:
            settle(self.device)  # a step may be under way
            self._graphs.close()
        self.forward.close()
        del self.forward, self.tables, self.drafter, self._graphs
        gc.collect()
        if self.device.type == "cuda":
            give_back()
