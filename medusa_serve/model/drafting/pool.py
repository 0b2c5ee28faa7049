"""One depth of the tree search, for all drafters, in torch: the best children of a node, and the pool of all nodes
found so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..sampling.filters import Sampling
from .draft import noisy
from .tree import HeadNodes

STEP_COST = 1e-4  # a child's log-probability is at least this much below its parent's, so that they never tie
NEVER = -1e9  # log-probability for infinite or NaN logits: finite, so that it can be sorted


class Children(NamedTuple):
    """The best R next tokens of W beams, best first: base ids and log-probabilities, both (B, W, R).

    W is 1 where all beams of a depth have the same children.
    """

    tokens: Tensor
    logp: Tensor


class Pool:
    """All nodes found so far, and which of them are beams: those get children next.

    tokens, parents (index in the pool + 1; 0 is the root), depths (B, size) int64 · scores (B, size): log-probabilities
    """

    def __init__(self, rows: int, size: int, device: torch.device) -> None:
        self.tokens, self.parents, self.depths = (torch.empty(rows, 0, dtype=torch.int64, device=device),) * 3
        self.scores = torch.empty(rows, 0, dtype=torch.float32, device=device)
        self._beams = torch.zeros(rows, 1, dtype=torch.float32, device=device)
        self._above = torch.zeros(rows, 1, dtype=torch.int64, device=device)

    def grow(self, tokens: Tensor, logp: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Add the beams' children (B, W or 1, R); the best `width` of them become the beams. → the old beam that each
        new one continues, and its token, (B, width) both.

        A child's score is below its parent's even where rounding would hide the difference. So if a child is among the
        best nodes, its parent is too.
        """
        parent = self._beams[:, :, None]
        logp = torch.nan_to_num(logp, nan=NEVER, neginf=NEVER)
        scores = torch.minimum(parent + logp, parent * (1 + 1e-6) - STEP_COST)
        tokens = tokens.expand_as(scores).flatten(1)
        above = self._above[:, :, None].expand_as(scores).flatten(1)
        filled, depths, ranks = self.scores.shape[1], torch.zeros_like(tokens), scores.shape[2]
        scores = scores.flatten(1)
        depths += self.depths[:, -1:] + 1 if filled else 1
        self.tokens, self.parents, self.depths, self.scores = (
            torch.cat(parts, dim=1)
            for parts in (
                (self.tokens, tokens), (self.parents, above), (self.depths, depths), (self.scores, scores),
            )
        )  # fmt: skip
        self._beams, best = scores.topk(width, dim=1)
        self._above = best + filled + 1
        return best // ranks, tokens.gather(1, best)

    def best(self, max_nodes: int) -> HeadNodes:
        """The M most probable nodes of the pool, best first. A child scores below its parent, so they form a tree."""
        best = self.scores.topk(max_nodes, dim=1).indices
        index = torch.zeros(best.shape[0], self.scores.shape[1] + 1, dtype=torch.int64, device=best.device)
        index.scatter_(1, best + 1, torch.arange(1, max_nodes + 1, device=best.device).expand_as(best))
        parents = index.gather(1, self.parents.gather(1, best))
        return HeadNodes(self.tokens.gather(1, best), parents, self.depths.gather(1, best))


def top_children(
    logits: Tensor,
    depth: int | None,
    length: Tensor,
    tau: Tensor,
    token_map: Tensor | None,
    sampling: Sampling,
    num_ranks: int,
) -> Children:
    """The best R tokens at each of P positions.

    logits (B, P, V'), overwritten: all at one depth, or (None) at depths 0 … P - 1 · length (B) · tau (2, D)
    float32: of greedy rows, of rows with noise · token_map (V') base ids or None
    """
    depths = slice(logits.shape[1]) if depth is None else slice(depth, depth + 1)
    position = length[:, None] + 1 + torch.arange(tau.shape[1], device=length.device)[depths]
    scores = logits.float()
    if sampling.sampled:
        scores = noisy(logits, token_map, position.expand(-1, logits.shape[1]), sampling)
    greedy_tau, noise_tau = tau[:, depths, None]
    scores.div_(torch.where((sampling.temperature > 0)[:, None, None], noise_tau, greedy_tau))
    best, ids = scores.topk(num_ranks, dim=-1)
    logp = best - scores.logsumexp(dim=-1, keepdim=True)
    return Children(ids if token_map is None else token_map[ids], logp)
