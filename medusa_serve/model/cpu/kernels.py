"""The operations of a step on a CPU, by Numba kernels. Torch's operations do what a kernel does not cover."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..drafting.lookup import MAX_NGRAM, MIN_NGRAM
from ..drafting.pool import NEVER, STEP_COST, Children, Pool
from ..forward.view import View
from ..sampling.filters import Sampling
from ..tables import Closed, Opened, SlotTables
from ..torch_kernels import TorchKernels, walk_by_depth
from . import attention, layer_ops, search, step
from .draft import NativeDraft


class CpuKernels:
    """Implements kernels.Kernels. Slabs, logits and attention have kernels only for bfloat16."""

    name = "numba"
    open_step = staticmethod(step.open_step)
    keep_drafts = staticmethod(step.keep_heads)
    new_pool = staticmethod(Pool)

    def __init__(self) -> None:
        self._torch = TorchKernels()

    def reads_lengths(self, widest: int) -> bool:
        return False

    def write_rows(
        self, key_slab: Tensor, value_slab: Tensor, slots: Tensor, columns: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        if _has_kernel(key_slab) and keys.stride(3) == 1 == values.stride(3):
            layer_ops.write_rows(key_slab, slots, columns, keys)
            layer_ops.write_rows(value_slab, slots, columns, values)
        else:
            self._torch.write_rows(key_slab, value_slab, slots, columns, keys, values)

    def commit_rows(self, slab: Tensor, slots: Tensor, length: Tensor, nodes: Tensor) -> None:
        if _has_kernel(slab):
            layer_ops.move_rows(slab, slots, length, nodes)
        else:
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
        if exact and softcap is None and sinks is None and attention.fits(query, keys, values, view):
            return attention.canonical_attention(query, keys, values, view, scaling, window)
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
        if sampling.sampled or sampling.penalties is not None or sampling.logprobs:
            return walk_by_depth(tables, slots, opened, logits, max_depth, sampling, rest=rest, lookup=self.lookup)
        if search.fits(logits):
            picked, best = search.largest(logits)
        else:
            best, picked = logits.max(dim=-1)
        return step.close_step(tables, slots, opened, picked, best, max_depth, rest=rest)

    def lookup(self, history: Tensor, length: Tensor, num_tokens: int) -> Tensor:
        return search.continuation(history.contiguous(), length, num_tokens, MAX_NGRAM, MIN_NGRAM)

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
        if sampling.sampled or not search.fits(logits):
            return self._torch.top_children(logits, depth, length, tau, token_map, sampling, num_ranks)
        greedy_tau = tau[0, : logits.shape[1]] if depth is None else tau[0, depth : depth + 1]
        ids, logp = search.best_children(logits, greedy_tau, num_ranks)
        return Children(ids if token_map is None else token_map[ids], logp)

    def rms_norm(self, x: Tensor) -> Tensor:
        if not _has_kernel(x):
            return self._torch.rms_norm(x)
        return layer_ops.rms_norm(x, _ones(x.shape[-1]), 1e-6)  # torch needs nine operations for it

    def search_at_once(self, heads: Any, tau: Tensor, num_ranks: int) -> NativeDraft | None:
        return NativeDraft(heads, tau, num_ranks, (STEP_COST, NEVER)) if NativeDraft.fits(heads) else None


@lru_cache
def _ones(size: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(size, dtype=torch.bfloat16)


def _has_kernel(slab: Tensor) -> bool:
    return slab.dtype == torch.bfloat16
