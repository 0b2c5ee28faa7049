"""The heads' part of the next step's tree. Candidates are ranked with the request's own noise (Gumbel coupling)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..sampling.filters import Sampling
from ..sampling.noise import gumbel
from .tree import HeadNodes, RankPath, Tree


class Drafter(Protocol):
    """Drafts from the last accepted node's hidden state, inside the batch, with static shapes."""

    max_nodes: int  # M of HeadNodes, set by `size`
    max_depth: int  # of these nodes

    def size(self, max_nodes: int, paths: Sequence[RankPath] | None) -> None:
        """Called once before serving. max_nodes: M · paths: a tree that the user gives, or None. Raises LoadError."""

    def draft(
        self,
        slots: torch.Tensor,
        hidden: torch.Tensor,
        pending: torch.Tensor,
        length: torch.Tensor,
        sampling: Sampling,
        nodes: int | None = None,
    ) -> HeadNodes:
        """slots (B) · hidden (B, H), of position `length` - 1 · pending (B), the token at position `length` (B) ·
        nodes: draft at most this many; None: max_nodes."""


class StaticDrafter:
    """One tree of rank paths for every step. `candidates` gives (B, num_heads, num_ranks) base ids, best first."""

    num_heads: int
    num_ranks: int

    def __init__(self, num_heads: int, num_ranks: int, order: Sequence[RankPath]) -> None:
        """order: the paths, most probable first."""
        self.num_heads, self.num_ranks, self._order = num_heads, num_ranks, tuple(order)
        self.size(len(self._order), None)

    def size(self, max_nodes: int, paths: Sequence[RankPath] | None) -> None:
        self._tree = Tree(tuple(paths) if paths is not None else self._order[:max_nodes])
        self._tree.check(self.num_heads, self.num_ranks)
        self.max_nodes, self.max_depth = self._tree.num_nodes - 1, self._tree.max_depth
        self._tables: tuple[torch.Tensor, ...] | None = None

    def candidates(self, slots, hidden, pending, length, sampling) -> torch.Tensor:
        raise NotImplementedError

    def draft(self, slots, hidden, pending, length, sampling, nodes=None) -> HeadNodes:
        found = self.candidates(slots, hidden, pending, length, sampling)
        if self._tables is None:
            device, indexes = found.device, range(1, self._tree.num_nodes)
            source = [(len(path) - 1) * found.shape[2] + path[-1] for path in self._tree.paths]
            lists = (source, [self._tree.parents[i] for i in indexes], [self._tree.depths[i] for i in indexes])
            self._tables = tuple(torch.tensor(values, dtype=torch.int64, device=device) for values in lists)
        where, parents, depths = self._tables
        tokens = found.flatten(1)[:, where[:nodes]]
        return HeadNodes(tokens, parents[:nodes].expand_as(tokens), depths[:nodes].expand_as(tokens))


class MedusaDrafter(StaticDrafter):
    """Parallel heads: head d predicts the token at position length + 1 + d (Cai et al., "Medusa", 2401.10774)."""

    def __init__(self, heads: Any, num_heads: int, num_ranks: int, order: Sequence[RankPath]) -> None:
        """heads: a MedusaHeads module of at least `num_heads` heads."""
        super().__init__(num_heads, num_ranks, order)
        self.heads = heads

    def candidates(self, slots, hidden, pending, length, sampling) -> torch.Tensor:
        logits = self.heads.logits(hidden)[:, : self.num_heads]
        return rank(logits, self.heads.token_map, length + 1, sampling, self.num_ranks)


def rank(
    logits: torch.Tensor, token_map: torch.Tensor | None, position: torch.Tensor, sampling: Sampling, num_ranks: int
) -> torch.Tensor:
    """The best `num_ranks` tokens at positions `position` … `position` + K - 1: base ids (B, K, num_ranks).

    logits (B, K, V') · token_map (V') base ids or None · position (B)
    """
    if sampling.sampled:
        where = position[:, None] + torch.arange(logits.shape[1], device=logits.device)
        logits = noisy(logits, token_map, where, sampling)
    best = logits.topk(num_ranks, dim=-1).indices
    return best if token_map is None else token_map[best]


def noisy(
    logits: torch.Tensor, token_map: torch.Tensor | None, position: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """log q / T + G for sampled rows, the logits themselves for greedy ones. logits (B, K, V') · position (B, K)"""
    hot = (sampling.temperature > 0)[:, None, None]
    ids = torch.arange(logits.shape[-1], device=logits.device) if token_map is None else token_map
    scaled = logits.float() / torch.where(hot, sampling.temperature[:, None, None], 1.0)
    return torch.where(hot, scaled + gumbel(sampling.seed[:, None, None], position[:, :, None], ids), logits.float())
