"""The operations of a step that differ by machine, and the one choice of their implementation.

torch_kernels.TorchKernels   torch alone: the others must equal it; a GPU without Triton kernels (a T4) runs it
gpu.kernels.GpuKernels       Triton
cpu.kernels.CpuKernels       Numba

All code that needs an operation gets the chosen object. No other code asks which machine this is.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from .cpu.workers import give_up_workers as give_up_workers
from .drafting.pool import Children
from .drafting.tree import HeadNodes
from .forward.view import View
from .gpu import attention as triton_attention
from .gpu.graphs import StepGraphs as StepGraphs
from .sampling.filters import Sampling
from .shapes import Shape
from .tables import Closed, Opened, SlotTables
from .torch_kernels import TorchKernels
from .weights.int4 import FewBitKernels


class NodePool(Protocol):
    """All nodes that a tree search has found; see drafting/pool.py."""

    def grow(self, tokens: Tensor, logp: Tensor, width: int) -> tuple[Tensor, Tensor]: ...

    def best(self, max_nodes: int) -> HeadNodes: ...


class WholeSearch(Protocol):
    """The tree search of a step as one call, for greedy rows."""

    def run(self, hidden: Tensor, pending: Tensor, widths: list[int], pool: int, nodes: int) -> HeadNodes:
        """hidden (B, M·H) · pending (B) · widths: beams after each depth, 0 after the last · pool: number of nodes to
        look at · nodes: how many of them to keep"""


class Kernels(Protocol):
    """B rows of slots, N nodes, D depth, V vocabulary, S slots of C columns, L layers. No call waits for a GPU.

    All implementations give the same integers; floats differ only in rounding.
    """

    name: str  # torch, triton or numba

    def reads_lengths(self, widest: int) -> bool:
        """Whether `attend` reads the rows' lengths on the device. One captured pass then serves all lengths and slots.
        widest: numbers in the longest key or value of an attention head"""

    def write_rows(
        self, key_slab: Tensor, value_slab: Tensor, slots: Tensor, columns: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Put the new rows of a layer into its slab. slabs (S, C, kv_heads, dim) · slots (B) · columns (B, N) · keys,
        values (B, kv_heads, N, dim)"""

    def commit_rows(self, slab: Tensor, slots: Tensor, length: Tensor, nodes: Tensor) -> None:
        """Move the accepted nodes' rows to the end of their sequences, in all layers. slab (L, S, C, kv_heads, dim) ·
        nodes (B, A): the path, the root first; entries after its end may be anything"""

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
        """query (B, heads, N, dim) · keys, values: the slab's layer (S, C, kv_heads, dim) → (B, N, heads, value dim)

        exact: on a CPU, a token's result depends only on the tokens that it sees, bit for bit"""

    def open_step(self, tables: SlotTables, slots: Tensor, active: Tensor, shape: Shape) -> Opened:
        """Make a tree for each row from the drafts in the tables. active (B) bool: rows that count, unless their
        pending token was the last one"""

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
        """Accept the tokens that each row picks (sampling/accept.py), advance the tables, and look up the next draft.

        logits (B, N, V) · rest: draft nothing for the next step, and drop the old draft"""

    def keep_drafts(
        self, tables: SlotTables, slots: Tensor, active: Tensor, heads: HeadNodes, facts: Tensor, ready: int
    ) -> None:
        """Store the active rows' nodes in the tables. facts[:, 4] becomes at least `ready` for rows that have any."""

    def lookup(self, history: Tensor, length: Tensor, num_tokens: int) -> Tensor:
        """See drafting/lookup.py."""

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
        """See drafting/pool.py."""

    def new_pool(self, rows: int, size: int, device: torch.device) -> NodePool:
        """An empty pool for B rows of `size` nodes each."""

    def rms_norm(self, x: Tensor) -> Tensor:
        """As drafting/heads.py's, without gradients."""

    def search_at_once(self, heads: Any, tau: Tensor, num_ranks: int) -> WholeSearch | None:
        """The tree search over these heads as one call; None if this machine has none for them. tau (D)"""


@lru_cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


def choose(device: torch.device) -> Kernels:
    """The implementation for this device."""
    if triton_attention.available(device):
        from .gpu.kernels import GpuKernels

        return GpuKernels()
    if device.type == "cpu" and _has_numba():
        from .cpu.kernels import CpuKernels

        return CpuKernels()
    return TorchKernels()


def few_bit_kernels() -> FewBitKernels:
    """The kernels for few-bit weights on a CPU: Numba's if it is installed."""
    if not _has_numba():
        return FewBitKernels()
    from .cpu.few_bits import few_bit_parts
    from .cpu.int_products import NativeInt4Linear
    from .cpu.warm_up import kernels_ahead

    return FewBitKernels(few_bit_parts, NativeInt4Linear, kernels_ahead)
