"""The model runner: the only code that launches device work. One step for everything; a tree of one node is plain
decoding."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from ..types import PrefillChunk, SamplingParams, StepOutput
from .accept import Limits, Walk, accept
from .attention import View, chain_view
from .draft import Drafter
from .forward import PlainForward, TreeForward
from .lookup import lookup
from .tables import SlotTables
from .tree import Tree, TreeTensors

ROW_BUDGET = {"cpu": 16, "cuda": 256}  # rows × nodes of one pass, until step times are measured


class ModelRunner:
    """Implements types.Runner over a TreeForward or a PlainForward.

    trees: by node count, without the plain one; drafter: None drafts from the lookup alone
    """

    def __init__(
        self,
        forward: TreeForward | PlainForward,
        tables: SlotTables,
        *,
        trees: dict[int, Tree],
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
        self._trees = {1: Tree()} | (trees if forward.supports_trees else {})
        self.node_choices = tuple(sorted(self._trees))
        heads, ranks = tables.candidates.shape[1:]
        self._tensors: dict[int, TreeTensors] = {
            n: t.tensors(heads, ranks, self.device) for n, t in self._trees.items()
        }
        self._host_length = [0] * self.num_slots
        self._prompts: list[list[int]] = [[] for _ in range(self.num_slots)]
        self._poisoned: set[int] = set()

    def admit(self, slot: int, prompt_ids: Sequence[int], params: SamplingParams, limit: int, num_reused: int) -> None:
        self.tables.admit(slot, prompt_ids, params, limit, num_reused)
        self._host_length[slot] = num_reused
        self._prompts[slot] = list(prompt_ids)

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[PrefillChunk]) -> list[StepOutput | None]:
        passes = [self._prefill_pass(chunk) for chunk in chunks]  # all of them before anything is kept
        return [self._keep_prefill(chunk, *done) for chunk, done in zip(chunks, passes, strict=True)]

    def _prefill_pass(self, chunk: PrefillChunk) -> tuple[torch.Tensor, torch.Tensor | None, View]:
        start = self._host_length[chunk.slot]
        ids = torch.tensor(self._prompts[chunk.slot][start : start + chunk.count], device=self.device)
        view = chain_view([chunk.slot], [start], len(ids), self.device)
        return (*self.forward.run(ids[None], view, last_only=True), view)

    def _keep_prefill(
        self, chunk: PrefillChunk, logits: torch.Tensor, hidden: torch.Tensor | None, view: View
    ) -> StepOutput | None:
        """Where the prompt is complete, its last token is the root of a tree of one: the walk emits the first token."""
        slot = chunk.slot
        end = self._host_length[slot] + view.num_new
        complete = end == len(self._prompts[slot])
        root = end - 1 if complete else end
        self.tables.length[slot] = self._host_length[slot] = root
        if not complete:  # a poisoned slot must not rest, even if its sequence is cancelled before its first token
            if bool(torch.isfinite(logits.max())):
                return None
            self._poisoned.add(slot)
            return StepOutput(slot, (), finished=True, failed=True)
        slots = view.slots
        sampling, limits = self.tables.sampling(slots, [slot]), self.tables.limits(slots)
        one = self._tensors[1]
        walk = accept(logits, self.tables.pending(slots)[:, None], one.parents, 0, sampling, limits)
        return self._keep([slot], slots, walk, hidden, torch.zeros_like(slots))[0]

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], nodes: int) -> list[StepOutput]:
        host_slots, tables, tree = list(slots), self.tables, self._tensors[nodes]
        rows = torch.tensor(host_slots, device=self.device)
        limits: Limits = tables.limits(rows)
        draft = tree.fill(tables.pending(rows), tables.candidates[rows], tables.lookup[rows], tables.node_limit[rows])
        view = View(
            rows, limits.length, host_slots, [self._host_length[slot] for slot in host_slots], tree.depths, tree.mask
        )
        logits, hidden = self.forward.run(draft, view)
        walk = accept(logits, draft, tree.parents, tree.max_depth, tables.sampling(rows, host_slots), limits)
        self.forward.commit(view, walk.nodes)
        drafted = (draft[:, 1:] >= 0).sum(dim=1)
        return self._keep(host_slots, rows, walk, hidden, drafted)

    def _keep(
        self, host_slots: list[int], rows: torch.Tensor, walk: Walk, hidden: torch.Tensor | None, drafted: torch.Tensor
    ) -> list[StepOutput]:
        """Advance the tables, draft for the next step, and bring the result to the host in one transfer."""
        self.tables.advance(rows, walk)
        ready = self._draft_next(host_slots, rows, walk, hidden)
        facts = torch.stack([walk.num_emitted, walk.finished, walk.finite, drafted, ready], dim=1)
        outputs = []
        for slot, line in zip(host_slots, torch.cat([facts, walk.tokens], dim=1).tolist(), strict=True):
            count, finished, finite, num_drafted, num_ready, *tokens = line
            if not finite:
                self._poisoned.add(slot)
                outputs.append(StepOutput(slot, (), num_drafted, finished=True, failed=True))
                continue
            self._host_length[slot] += count
            outputs.append(StepOutput(slot, tuple(tokens[:count]), num_drafted, bool(finished), False, num_ready))
        return outputs

    def _draft_next(
        self, host_slots: list[int], rows: torch.Tensor, walk: Walk, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """Candidates and lookup for the next tree; → (B) draft tokens at hand. Heads see the last accepted node
        only."""
        tables, ready = self.tables, torch.zeros_like(rows)
        length = tables.length[rows]
        if self.drafter is not None and hidden is not None:
            last = walk.nodes.gather(1, (walk.num_emitted - 1).clamp(min=0)[:, None])[:, 0]
            at = hidden[torch.arange(len(rows), device=rows.device), last]
            sampling = tables.sampling(rows, host_slots)
            found = self.drafter.candidates(rows, at, tables.pending(rows), length, sampling)
            tables.candidates[rows] = found
            ready = (found >= 0).any(dim=2).any(dim=1) * (self.node_choices[-1] - 1)
        if tables.lookup.shape[1]:
            found = lookup(tables.history[rows], length, tables.lookup.shape[1])
            tables.lookup[rows] = found
            ready = torch.maximum(ready, (found >= 0).sum(dim=1))
        return ready

    def free(self, slot: int) -> None:
        if slot in self._poisoned or not self.can_reuse:
            self.forward.zero(slot)
            self._poisoned.discard(slot)
        self._host_length[slot] = 0
        self._prompts[slot] = []

    def close(self) -> None:
        self.forward.close()
        del self.forward, self.tables, self.drafter
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
