"""The operations of a step by torch alone. A GPU without Triton kernels (a T4) runs them, and the other implementations
are compared with them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .drafting.heads import rms_norm
from .drafting.lookup import lookup
from .drafting.pool import Pool, top_children
from .drafting.tree import HeadNodes, assemble
from .forward.attention import attend
from .forward.view import ancestor_bits
from .sampling.accept import Limits, Pick, accept, ended
from .sampling.filters import Sampling, pick
from .shapes import Shape
from .tables import Closed, Opened, SlotTables


class Lookup(Protocol):
    def __call__(self, history: Tensor, length: Tensor, num_tokens: int) -> Tensor: ...


class TorchKernels:
    """Implements kernels.Kernels."""

    name = "torch"
    attend = staticmethod(attend)
    lookup = staticmethod(lookup)
    top_children = staticmethod(top_children)
    new_pool = staticmethod(Pool)
    rms_norm = staticmethod(rms_norm)

    def reads_lengths(self, widest: int) -> bool:
        return False

    def write_rows(
        self, key_slab: Tensor, value_slab: Tensor, slots: Tensor, columns: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        key_slab[slots[:, None], columns] = keys.transpose(1, 2)
        value_slab[slots[:, None], columns] = values.transpose(1, 2)

    def commit_rows(self, slab: Tensor, slots: Tensor, length: Tensor, nodes: Tensor) -> None:
        steps = torch.arange(nodes.shape[1], device=nodes.device)
        source, target = length[:, None] + nodes, length[:, None] + steps
        at = slots[:, None]
        slab[:, at, target] = slab[:, at, source]

    def open_step(self, tables: SlotTables, slots: Tensor, active: Tensor, shape: Shape) -> Opened:
        limits, pending = tables.limits(slots), tables.pending(slots)
        heads, found = tables.head_nodes(slots), tables.lookup[slots]
        draft = assemble(pending, heads, found, tables.node_limit[slots], *shape)
        columns = limits.length[:, None] + torch.arange(shape.num_nodes, device=slots.device)
        drafted = (draft.tokens[:, 1:] >= 0).sum(dim=1)
        positions, bits = limits.length[:, None] + draft.depths, ancestor_bits(draft.mask)
        on = active & ~ended(pending, limits)  # the host reads one step late: it may not know yet
        return Opened(draft.tokens, draft.parents, positions, columns, bits, limits.length, on, drafted)

    def walk(
        self,
        tables: SlotTables,
        slots: Tensor,
        opened: Opened,
        logits: Tensor,
        max_depth: int,
        sampling: Sampling,
        *,
        rest: bool,
    ) -> Closed:
        every = None
        if logits.is_cuda and sampling.penalties is None and not sampling.sampled:
            best = logits.max(dim=-1)  # one launch; on a CPU it is cheaper to look only at the walked nodes
            every = best.indices, best.values
        return walk_by_depth(tables, slots, opened, logits, max_depth, sampling, rest=rest, every=every)

    def keep_drafts(
        self, tables: SlotTables, slots: Tensor, active: Tensor, heads: HeadNodes, facts: Tensor, ready: int
    ) -> None:
        tables.keep_heads(slots, active, heads)
        some = (heads.tokens >= 0).any(dim=1)
        facts[:, 4] = torch.maximum(facts[:, 4], some * ready)

    def search_at_once(self, heads: Any, tau: Tensor, num_ranks: int) -> None:
        return None


def walk_by_depth(
    tables: SlotTables,
    slots: Tensor,
    opened: Opened,
    logits: Tensor,
    max_depth: int,
    sampling: Sampling,
    *,
    rest: bool,
    pick: Pick = pick,
    every: tuple[Tensor, Tensor] | None = None,
    lookup: Lookup = lookup,
) -> Closed:
    """Kernels.walk depth by depth: penalties and log-probabilities need that. pick, every: see `accept`"""
    limits = Limits(opened.length, tables.total[slots], tables.eos[slots])
    walk = accept(logits, opened.tokens, opened.parents, max_depth, sampling, limits, pick=pick, every=every)
    count = tables.advance(slots, opened.active, walk)
    length, num_lookup = tables.length[slots], tables.lookup.shape[1]
    if rest:
        found = torch.full((len(slots), num_lookup), -1, dtype=torch.int64, device=slots.device)
        tables.heads.tokens[slots] = torch.where(opened.active[:, None], -1, tables.heads.tokens[slots])
    else:
        found = lookup(tables.history[slots], length, num_lookup)
    tables.lookup[slots] = torch.where(opened.active[:, None], found, tables.lookup[slots])
    results = torch.stack([count, walk.finished, walk.finite, opened.drafted, (found >= 0).sum(dim=1)], dim=1)
    asked = [] if walk.logprobs is None else [walk.logprobs.flatten(1)]
    last = walk.nodes.gather(1, (walk.num_emitted - 1).clamp(min=0)[:, None])[:, 0]
    results = torch.cat([results, walk.tokens, walk.nodes, *asked], dim=1)
    return Closed(results, walk.nodes, last, length, tables.pending(slots))
