"""The model runner: the only code that launches device work. One step for everything; a tree of one node is plain
decoding."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from ..types import PrefillChunk, SamplingParams, StepOutput
from .accept import Limits, Walk, accept
from .attention import chain_view, tree_view
from .draft import Drafter
from .filters import Sampling
from .forward import PlainForward, TreeForward
from .graphs import StepGraphs
from .lookup import lookup
from .plan import Shape
from .tables import SlotTables
from .tree import assemble

ROW_BUDGET = {"cpu": 16, "cuda": 256}  # rows × nodes of one pass, until step times are measured
PREFILL_ROWS = {"cpu": 1, "cuda": 64}  # prompts of one prefill pass; a CPU is busy with one


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
    ) -> None:
        self.forward, self.tables, self.drafter = forward, tables, drafter
        self.device = tables.history.device
        self.num_slots = tables.length.shape[0]
        self.max_context, self.vocab_size = max_context, vocab_size
        self.eos_ids = frozenset(eos_ids)
        self.can_reuse = forward.supports_trees
        self.activity: str | None = None
        self.row_budget = ROW_BUDGET[self.device.type]
        self.prefill_rows = PREFILL_ROWS[self.device.type] if forward.supports_trees else 1
        self._shapes = shapes
        self.node_choices = tuple(sorted(shapes))
        self._graphs = StepGraphs(self) if self.device.type == "cuda" and forward.supports_trees else None
        self._host_length = [0] * self.num_slots
        self._prompts: list[list[int]] = [[] for _ in range(self.num_slots)]
        self._poisoned: set[int] = set()

    def admit(self, slot: int, prompt_ids: Sequence[int], params: SamplingParams, limit: int, num_reused: int) -> None:
        self.tables.admit(slot, prompt_ids, params, limit, num_reused)
        self._host_length[slot] = num_reused
        self._prompts[slot] = list(prompt_ids)

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[PrefillChunk]) -> list[StepOutput | None]:
        groups = [chunks[i : i + self.prefill_rows] for i in range(0, len(chunks), self.prefill_rows)]
        passes = [self._prefill_pass(group) for group in groups]  # all of them before anything is kept
        return [out for group, done in zip(groups, passes, strict=True) for out in self._keep_prefill(group, *done)]

    def _prefill_pass(self, chunks: Sequence[PrefillChunk]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next tokens of several prompts, at the right end of their rows → logits (B, 1, V), hidden (B, 1, H)."""
        slots = [chunk.slot for chunk in chunks]
        starts = [self._host_length[slot] for slot in slots]
        counts = [chunk.count for chunk in chunks]
        scratch = self.tables.history.shape[1] - 1
        view = chain_view(slots, starts, counts, self.device, scratch)
        rows = []
        for slot, start, count in zip(slots, starts, counts, strict=True):
            rows.append([0] * (view.num_new - count) + self._prompts[slot][start : start + count])
        return self.forward.run(torch.tensor(rows, device=self.device), view, last_only=True)

    def _keep_prefill(
        self, chunks: Sequence[PrefillChunk], logits: torch.Tensor, hidden: torch.Tensor | None
    ) -> list[StepOutput | None]:
        """Where a prompt is complete, its last token is the root of a tree of one: the walk emits the first token."""
        finite = torch.isfinite(logits.amax(dim=(1, 2))).tolist()
        outputs: list[StepOutput | None] = [None] * len(chunks)
        complete = []
        for row, chunk in enumerate(chunks):
            slot = chunk.slot
            self._host_length[slot] += chunk.count
            if not finite[row]:  # a poisoned slot must not rest, even if its sequence is cancelled
                self._poisoned.add(slot)
                outputs[row] = StepOutput(slot, (), finished=True, failed=True)
            elif self._host_length[slot] == len(self._prompts[slot]):
                self._host_length[slot] -= 1
                complete.append(row)
        host_slots = [chunk.slot for chunk in chunks]
        lengths = torch.tensor([self._host_length[slot] for slot in host_slots], device=self.device)
        self.tables.length[torch.tensor(host_slots, device=self.device)] = lengths
        if complete:
            done = self._first_tokens([host_slots[row] for row in complete], logits[complete], _rows(hidden, complete))
            for row, out in zip(complete, done, strict=True):
                outputs[row] = out
        return outputs

    def _first_tokens(
        self, host_slots: list[int], logits: torch.Tensor, hidden: torch.Tensor | None
    ) -> list[StepOutput]:
        tables, slots = self.tables, torch.tensor(host_slots, device=self.device)
        sampling = tables.sampling(slots, *tables.flags(host_slots))
        root = tables.head_nodes(slots)
        draft = assemble(tables.pending(slots), root, tables.lookup[slots], tables.node_limit[slots], 1, 0, 0)
        walk = accept(logits, draft, 0, sampling, tables.limits(slots))
        facts = self._keep(slots, torch.ones_like(walk.finite), walk, hidden, torch.zeros_like(slots), sampling)
        return self._outputs(host_slots, facts.tolist())

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], nodes: int) -> list[StepOutput]:
        host_slots, shape = list(slots), self._shapes[nodes]
        lengths = [self._host_length[slot] for slot in host_slots]
        flags = self.tables.flags(host_slots)
        if self._graphs is not None:
            facts = self._graphs.run(host_slots, max(lengths) + nodes, shape, *flags)
        else:
            rows = torch.tensor(host_slots, device=self.device)
            active = torch.ones_like(rows, dtype=torch.bool)
            facts = self.step(rows, active, host_slots, lengths, max(lengths) + nodes, shape, *flags).tolist()
        return self._outputs(host_slots, facts)

    def step(
        self,
        slots: torch.Tensor,
        active: torch.Tensor,
        host_slots: list[int],
        host_length: list[int],
        width: int,
        shape: Shape,
        sampled: bool,
        filtered: bool,
    ) -> torch.Tensor:
        """Draft, verify, accept, commit, draft for the next step: device work alone, no wait for it.

        slots (B) · active (B): rows that count; the others only fill the batch · width: columns of keys to read
        → (B, 5 + D + 1): tokens kept, finished, finite, drafted, ready for the next step, then the tokens
        """
        tables = self.tables
        limits: Limits = tables.limits(slots)
        draft = assemble(
            tables.pending(slots), tables.head_nodes(slots), tables.lookup[slots], tables.node_limit[slots], *shape
        )
        view = tree_view(slots, limits.length, host_slots, host_length, draft, width)
        logits, hidden = self.forward.run(draft.tokens, view)
        sampling = tables.sampling(slots, sampled, filtered)
        walk = accept(logits, draft, shape.max_depth, sampling, limits)
        self.forward.commit(view, walk.nodes)
        drafted = (draft.tokens[:, 1:] >= 0).sum(dim=1)
        return self._keep(slots, active, walk, hidden, drafted, sampling)

    def _keep(
        self,
        slots: torch.Tensor,
        active: torch.Tensor,
        walk: Walk,
        hidden: torch.Tensor | None,
        drafted: torch.Tensor,
        sampling: Sampling,
    ) -> torch.Tensor:
        """Advance the tables and draft for the next step; → the step's facts."""
        count = self.tables.advance(slots, active, walk)
        ready = self._draft_next(slots, active, walk, hidden, sampling)
        facts = torch.stack([count, walk.finished, walk.finite, drafted, ready], dim=1)
        return torch.cat([facts, walk.tokens], dim=1)

    def _draft_next(
        self,
        slots: torch.Tensor,
        active: torch.Tensor,
        walk: Walk,
        hidden: torch.Tensor | None,
        sampling: Sampling,
    ) -> torch.Tensor:
        """Heads (on the last accepted node only) and lookup for the next tree; → (B) draft tokens at hand."""
        tables, ready = self.tables, torch.zeros_like(slots)
        length, heads = tables.length[slots], None
        if self.drafter is not None and hidden is not None:
            last = walk.nodes.gather(1, (walk.num_emitted - 1).clamp(min=0)[:, None])[:, 0]
            at = hidden[torch.arange(slots.shape[0], device=slots.device), last]
            heads = self.drafter.draft(slots, at, tables.pending(slots), length, sampling)
            ready = (heads.tokens >= 0).any(dim=1) * (self.node_choices[-1] - 1)
        found = lookup(tables.history[slots], length, tables.lookup.shape[1])
        ready = torch.maximum(ready, (found >= 0).sum(dim=1))
        tables.keep_draft(slots, active, heads, found)
        return ready

    def _outputs(self, host_slots: list[int], facts: list[list[int]]) -> list[StepOutput]:
        outputs = []
        for slot, (count, finished, finite, drafted, ready, *tokens) in zip(host_slots, facts, strict=True):
            if finite:
                self._host_length[slot] += count
                kept = tuple(tokens[:count])
                outputs.append(StepOutput(slot, kept, drafted, bool(finished), False, ready))
            else:
                self._poisoned.add(slot)
                outputs.append(StepOutput(slot, (), drafted, finished=True, failed=True))
        return outputs

    def free(self, slot: int) -> None:
        if slot in self._poisoned or not self.can_reuse:
            self.forward.zero(slot)
            self._poisoned.discard(slot)
        self._host_length[slot] = 0
        self._prompts[slot] = []

    def close(self) -> None:
        if self._graphs is not None:
            self._graphs.close()
        self.forward.close()
        del self.forward, self.tables, self.drafter, self._graphs
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _rows(tensor: torch.Tensor | None, rows: list[int]) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]
