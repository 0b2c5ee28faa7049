"""One step of the engine on every machine: open, run, walk, commit, draft. A tree of one node is plain decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .drafting.draft import Drafter
from .forward.plain_forward import PlainForward
from .forward.prefill_blocks import FEW, Packed, block_view
from .forward.tree_forward import TreeForward
from .forward.view import View
from .kernels import Kernels
from .sampling.filters import Sampling
from .shapes import Shape, heads_fill
from .tables import PLAIN, Closed, Needs, Opened, SlotTables


@dataclass(frozen=True)
class Step:
    """Only device work, and it never waits for the device, so a GPU can capture each call.

    drafter: None: only the lookup drafts · shapes: of a step, by node count · packed: passes see all rows as one
    · in_blocks: prefill passes do so too, with prompts cut into blocks
    """

    kernels: Kernels
    tables: SlotTables
    forward: TreeForward | PlainForward
    drafter: Drafter | None
    shapes: dict[int, Shape]
    packed: bool = False
    in_blocks: bool = False

    def __call__(
        self,
        slots: Tensor,
        active: Tensor,
        host_slots: list[int],
        host_length: list[int],
        width: int,
        shape: Shape,
        needs: Needs = PLAIN,
    ) -> Tensor:
        """slots (B) · active (B): rows that count; the others fill the batch up · width: columns of keys to read

        → results (B, 5 + 2 (D + 1)): tokens kept, finished, finite, drafted, ready for the next step, the tokens, their
        nodes; with log-probabilities NUM_TOLD (D + 1) more, as in Walk
        """
        tables, sampling = self.tables, self.tables.sampling(slots, needs)
        opened = self.kernels.open_step(tables, slots, active, shape)
        new = opened.positions, opened.columns, opened.bits
        view = View(slots, opened.length, host_slots, host_length, *new, width, self.packed)
        logits, hidden = self.forward.run(opened.tokens, view)
        walked = self._walk(slots, opened, logits, sampling, shape.max_depth, shape)
        self.forward.commit(view, walked.nodes)
        self._draft(slots, opened, walked, hidden, sampling, shape)
        return walked.facts

    def first_tokens(
        self,
        slots: Tensor,
        length: Tensor,
        complete: Tensor,
        logits: Tensor,
        hidden: Tensor | None,
        needs: Needs,
        shape: Shape,
    ) -> Tensor:
        """After a prefill pass: the last token of a complete prompt is a tree of one node, and its KV row is in place.

        length (B): -1 leaves the row as it is · complete (B) 0 or 1 · logits (B, 1, V) · shape: of the next step
        """
        opened = _roots(self.tables, slots, length, complete)
        sampling = self.tables.sampling(slots, needs)
        walked = self._walk(slots, opened, logits, sampling, 0, shape)
        self._draft(slots, opened, walked, hidden, sampling, shape)
        return walked.facts

    def prefill(self, packed: Packed, width: int, needs: Needs) -> Tensor:
        """A prefill pass in blocks; → the results of its R rows."""
        blocks, columns = len(packed.slots), self.tables.history.shape[1]
        view = block_view(packed, columns, [0] * blocks, [0] * blocks, width)
        assert isinstance(self.forward, TreeForward)
        logits, hidden = self.forward.run_packed(packed.tokens, view, packed.last)
        shape = self.shapes[self.first_nodes(len(packed.rows))]
        return self.first_tokens(packed.rows, packed.lengths, packed.whole, logits, hidden, needs, shape)

    def first_nodes(self, prompts: int) -> int:
        """N of the tree that a prefill pass of `prompts` prompts drafts for their first steps."""
        choices = sorted(self.shapes)
        few = not self.in_blocks or prompts <= FEW
        return choices[-1 if few else min(1, len(choices) - 1)]

    def _walk(
        self, slots: Tensor, opened: Opened, logits: Tensor, sampling: Sampling, max_depth: int, shape: Shape
    ) -> Closed:
        """Every emitted token is picked here: code that forbids tokens must mask the logits (B, N, V) before this
        call."""
        rest = self._rests(shape)
        return self.kernels.walk(self.tables, slots, opened, logits, max_depth, sampling, rest=rest)

    def _rests(self, shape: Shape) -> bool:
        """Whether the heads do not draft: after a plain step the next step is likely plain too."""
        return self.drafter is not None and shape.num_nodes == 1

    def _draft(
        self, slots: Tensor, opened: Opened, walked: Closed, hidden: Tensor | None, sampling: Sampling, shape: Shape
    ) -> None:
        """Draft the heads' nodes for the next tree, from the last accepted node."""
        drafter = self.drafter
        if drafter is None or hidden is None or self._rests(shape):
            return
        at = hidden[torch.arange(slots.shape[0], device=slots.device), walked.last]
        nodes = heads_fill(shape, drafter.max_nodes)
        heads = drafter.draft(slots, at, walked.pending, walked.length, sampling, nodes)
        ready = max(self.shapes) - 1
        self.kernels.keep_drafts(self.tables, slots, opened.active, heads, walked.facts, ready)


def _roots(tables: SlotTables, slots: Tensor, length: Tensor, complete: Tensor) -> Opened:
    """Trees with one node each: the last token of the prompt."""
    tables.length[slots] = torch.where(length >= 0, length, tables.length[slots])
    length, none = tables.length[slots], torch.zeros_like(slots)
    at = length[:, None]
    return Opened(
        tables.pending(slots)[:, None], none[:, None], at, at, none[:, None] + 1, length, complete.bool(), none
    )
