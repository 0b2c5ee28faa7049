"""Per-context trees from sequential heads: the N most probable nodes of this step, found depth by depth.

As in EAGLE-2 (Li et al. 2024), with static shapes. A node's probability is the product of its path's. Under noise the
probability that a token is picked is not q: it concentrates on the few tokens that the noise favours, and
softmax((log q / T + G) / tau) tells how much, tau fitted in calibration (1 until then).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import LoadError
from .draft import noisy
from .filters import Sampling
from .tree import HeadNodes, RankPath

RANKS = 8  # children that one node may have
STEP_COST = 1e-4  # log-probability taken off per depth: a child never ties with its parent


class SequentialDrafter:
    """Beam search with static shapes over heads that have start, advance and logits (SequentialHeads, HydraHeads)."""

    def __init__(self, heads: Any, tau: Sequence[float] | None = None, num_ranks: int = RANKS) -> None:
        """heads: attached to the base · tau: per depth, at temperature > 0"""
        self.heads, self._tau = heads, list(tau or [])
        self._num_ranks = num_ranks
        self.size(63, None)

    def size(self, max_nodes: int, paths: Sequence[RankPath] | None) -> None:
        if paths is not None:
            raise LoadError(
                "a tree file places candidates of parallel heads; sequential heads choose theirs themselves."
            )
        self._width = min(16, max(2, (max_nodes + 1) // 4))
        self._depth = min(self.heads.max_depth, max_nodes)
        available = self._num_ranks * (1 + (self._depth - 1) * min(self._width, self._num_ranks))
        self.max_nodes, self.max_depth = min(max_nodes, available), self._depth

    def draft(
        self,
        slots: torch.Tensor,
        hidden: torch.Tensor,
        pending: torch.Tensor,
        length: torch.Tensor,
        sampling: Sampling,
    ) -> HeadNodes:
        rows, device = pending.shape[0], pending.device
        state = self.heads.start(hidden, pending)[:, None]  # (B, W, S)
        scores = torch.zeros(rows, 1, device=device)
        above = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # pool index of each beam, + 1; 0 is the root
        pool: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # tokens, parents, scores of each depth
        size = 0
        for depth in range(self._depth):
            logits = self.heads.logits(state.flatten(0, 1)).unflatten(0, (rows, -1))
            tokens, logp = self._children(logits, length + 1 + depth, depth, sampling)
            total = (scores[:, :, None] + logp - STEP_COST).flatten(1)
            parents = above[:, :, None].expand_as(logp).flatten(1)
            pool.append((tokens.flatten(1), parents, total))
            if depth + 1 == self._depth:
                break
            scores, best = total.topk(min(self._width, total.shape[1]), dim=1)
            state = state.gather(1, (best // self._num_ranks)[:, :, None].expand(-1, -1, state.shape[2]))
            chosen = tokens.flatten(1).gather(1, best)
            state = self.heads.advance(state.flatten(0, 1), chosen.flatten()).unflatten(0, (rows, -1))
            above = best + size + 1
            size += total.shape[1]
        return self._best(pool)

    def _children(
        self, logits: torch.Tensor, position: torch.Tensor, depth: int, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits (B, W, V') → the best base ids of each beam (B, W, ranks), and their log-probabilities."""
        logits = logits.float()
        token_map = self.heads.token_map
        if sampling.sampled:
            tau = self._tau[depth] if depth < len(self._tau) else 1.0
            hot = (sampling.temperature > 0)[:, None, None]
            drawn = noisy(logits, token_map, position[:, None].expand(-1, logits.shape[1]), sampling)
            logits = torch.where(hot, drawn / tau, logits)
        best, ids = logits.topk(self._num_ranks, dim=-1)
        logp = best - logits.logsumexp(dim=-1, keepdim=True)
        return (ids if token_map is None else token_map[ids]), logp

    def _best(self, pool: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> HeadNodes:
        """The M most probable nodes of the pool, best first. A child scores below its parent, so they form a tree."""
        tokens, parents, scores = (torch.cat(parts, dim=1) for parts in zip(*pool, strict=True))
        depth_of = [torch.full((part[0].shape[1],), d + 1, device=tokens.device) for d, part in enumerate(pool)]
        best = scores.topk(self.max_nodes, dim=1).indices
        place = torch.zeros(tokens.shape[0], tokens.shape[1] + 1, dtype=torch.int64, device=tokens.device)
        place.scatter_(1, best + 1, torch.arange(1, self.max_nodes + 1, device=tokens.device).expand_as(best))
        new_parents = place.gather(1, parents.gather(1, best))
        return HeadNodes(tokens.gather(1, best), new_parents, torch.cat(depth_of)[best])
