"""The operations of a step on a GPU of compute capability 8.0 or more, by Triton kernels. Torch's operations do what a
kernel does not cover."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..drafting.pool import Children
from ..drafting.tree import HeadNodes
from ..forward.view import View
from ..sampling.filters import Sampling
from ..shapes import Shape
from ..tables import Closed, Opened, SlotTables
from ..torch_kernels import TorchKernels, walk_by_depth
from . import attention, search, step
from .pick import pick_nodes


class GpuKernels:
    """Implements kernels.Kernels."""

    name = "triton"

    def __init__(self) -> None:
        self._torch = TorchKernels()

    def reads_lengths(self, widest: int) -> bool:
        return widest <= attention.MAX_DIM

    def write_rows(
        self, key_slab: Tensor, value_slab: Tensor, slots: Tensor, columns: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        if attention.available(key_slab.device) and keys.stride(3) == 1 == values.stride(3):
            attention.write_rows(key_slab, value_slab, slots, columns, keys, values)
        else:
            self._torch.write_rows(key_slab, value_slab, slots, columns, keys, values)

    def commit_rows(self, slab: Tensor, slots: Tensor, length: Tensor, nodes: Tensor) -> None:
        self._torch.commit_rows(slab, slots, length, nodes)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        view: View,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        exact: bool = False,
    ) -> Tensor:
        plain = not exact and softcap is None and sinks is None
        if plain and attention.fits(query, values, view):
            return attention.tree_attention(query, keys, values, view, scaling, window)
        return self._torch.attend(query, keys, values, view, scaling, window, softcap, sinks, exact)

    def open_step(self, tables: SlotTables, slots: Tensor, active: Tensor, shape: Shape) -> Opened:
        return step.open_step(tables, slots, active, shape)

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
        if sampling.penalties is not None:
            return walk_by_depth(tables, slots, opened, logits, max_depth, sampling, rest=rest, pick=_pick)
        if sampling.sampled:
            picked, best = pick_nodes(logits, sampling, opened.positions + 1)
        else:
            best, picked = logits.max(dim=-1)
        if sampling.logprobs:
            every = picked, best
            return walk_by_depth(tables, slots, opened, logits, max_depth, sampling, rest=rest, every=every)
        return step.close_step(tables, slots, opened, picked, best, max_depth, rest=rest)

    def keep_drafts(
        self, tables: SlotTables, slots: Tensor, active: Tensor, heads: HeadNodes, facts: Tensor, ready: int
    ) -> None:
        step.keep_heads(tables, slots, active, heads, facts, ready)

    def lookup(self, history: Tensor, length: Tensor, num_tokens: int) -> Tensor:
        return self._torch.lookup(history, length, num_tokens)

    def top_children(
        self,
        logits: Tensor,
        depth: int | None,
        length: Tensor,
        tau: Tensor,
        token_map: Tensor | None,
        sampling: Sampling,
        num_ranks: int,
    ) -> Children:
        return Children(*search.top_children(logits, depth, length, tau, token_map, sampling, num_ranks))

    def new_pool(self, rows: int, size: int, device: torch.device) -> search.FusedPool:
        return search.FusedPool(rows, size, device)

    def rms_norm(self, x: Tensor) -> Tensor:
        return self._torch.rms_norm(x)

    def search_at_once(self, heads: Any, tau: Tensor, num_ranks: int) -> None:
        return None

    def warm_up(self) -> None:
        """Triton compiles a kernel where it is first called, before a step is captured."""


def _pick(logits: Tensor, sampling: Sampling, position: Tensor) -> tuple[Tensor, Tensor]:
    """Like filters.pick, but always by this kernel, so that a row's noise does not depend on the other rows."""
    picked, best = pick_nodes(logits[:, None], sampling, position[:, None])
    return picked[:, 0], best[:, 0].isfinite()
