"""The operations of a step on a GPU of compute capability 8.0 or more, by Triton kernels. Torch's operations do what a
kernel does not cover."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..drafting.heads import rms_norm
from ..drafting.lookup import lookup
from ..forward.view import View
from ..sampling.filters import Sampling
from ..tables import Closed, Opened, SlotTables
from ..torch_kernels import TorchKernels, walk_by_depth
from . import attention, search, step
from .pick import pick_nodes


class GpuKernels:
    """Implements kernels.Kernels."""

    name = "triton"
    open_step = staticmethod(step.open_step)
    keep_drafts = staticmethod(step.keep_heads)
    lookup = staticmethod(lookup)
    top_children = staticmethod(search.top_children)
    new_pool = staticmethod(search.FusedPool)
    rms_norm = staticmethod(rms_norm)

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

    def search_at_once(self, heads: Any, tau: Tensor, num_ranks: int) -> None:
        return None


def _pick(logits: Tensor, sampling: Sampling, position: Tensor) -> tuple[Tensor, Tensor]:
    """Like filters.pick, but always by this kernel, so that a row's noise does not depend on the other rows."""
    picked, best = pick_nodes(logits[:, None], sampling, position[:, None])
    return picked[:, 0], best[:, 0].isfinite()
