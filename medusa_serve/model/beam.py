"""Per-context trees: the N most probable nodes of this step, best first, found depth by depth with static shapes.

As in EAGLE-2 (Li et al., 2406.16858), for both families. A node's probability is the product of p_d(token) along its
path. q, the heads' own distribution, is a soft label and no such probability; the temperatures make it one:

    greedy   p_d = softmax(log q / tau_d)                      how often a candidate is the base's first choice
    T > 0    p_d = softmax((log q / T + G) / noise_tau_d)      the noise favours a few tokens: p_d is sharper than q

tau and noise_tau are fitted in calibration (1 until then). Within one parent's children they change no order, across
parents and depths they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import LoadError
from .draft import Drafter, MedusaDrafter, noisy
from .filters import Sampling
from .heads import HeadsInfo
from .tree import NUM_RANKS, HeadNodes, RankPath

STEP_COST = 1e-4  # a child's log-probability is lower than its parent's by this at least, so that they never tie
NEVER = -1e9  # log-probability of what the heads give none (infinite or NaN logits): finite, so that it still orders

State = TypeVar("State")


class Children(NamedTuple):
    """The best R next tokens of W beams, best first: base ids and log-probabilities, both (B, W, R).

    W is 1 where all beams of a depth have the same children.
    """

    tokens: Tensor
    logp: Tensor


class _ContextDrafter(Generic[State]):
    """The search that both families share. A family says how a beam's children are found: begin, children, follow."""

    most_ranks: int  # children that one node may have

    def __init__(
        self,
        heads: Any,
        tau: Sequence[float] | None = None,
        noise_tau: Sequence[float] | None = None,
        num_ranks: int | None = None,
    ) -> None:
        """heads: attached to the base · tau, noise_tau: per depth, of greedy rows and of rows at T > 0 · num_ranks R"""
        self.heads, depths = heads, heads.max_depth
        self._num_ranks = min(num_ranks or self.most_ranks, heads.output.vocab_size)
        both = [[*(given or ()), *[1.0] * depths][:depths] for given in (tau, noise_tau)]
        self._tau = torch.tensor(both, dtype=torch.float32, device=heads.output.weight.device)  # (2, D)
        self.size(63, None)

    def size(self, max_nodes: int, paths: Sequence[RankPath] | None) -> None:
        if paths is not None:
            raise LoadError(
                "a tree file places candidates of parallel heads; these choose a tree of their own each step."
            )
        # of 7 nodes none is likely to stand deeper than 3 or 4, and each depth costs a pass of the output layer
        self.max_depth = min(self.heads.max_depth, (max_nodes + 1).bit_length())
        self._width = self.beams(max_nodes)
        beams, pool = 1, 0
        for _ in range(self.max_depth):
            pool += beams * self._num_ranks
            beams = min(self._width, beams * self._num_ranks)
        self.max_nodes = min(max_nodes, pool)

    def beams(self, max_nodes: int) -> int:
        """W: how many nodes of a depth may have children."""
        raise NotImplementedError

    def begin(self, hidden: Tensor, pending: Tensor, length: Tensor, sampling: Sampling) -> State:
        """The state of one beam, the root."""
        raise NotImplementedError

    def children(self, state: State, depth: int, length: Tensor, sampling: Sampling) -> Children:
        """depth: of the beams, 0 for the root."""
        raise NotImplementedError

    def follow(self, state: State, beam: Tensor, tokens: Tensor) -> State:
        """beam (B, W'): which of the W beams each new one goes on from, by tokens (B, W')."""
        raise NotImplementedError

    def draft(self, slots: Tensor, hidden: Tensor, pending: Tensor, length: Tensor, sampling: Sampling) -> HeadNodes:
        rows, device = pending.shape[0], pending.device
        state = self.begin(hidden, pending, length, sampling)
        scores = torch.zeros(rows, 1, device=device)
        above = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # pool index of each beam, + 1; 0 is the root
        pool: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens, parents, scores of each depth
        size = 0
        for depth in range(self.max_depth):
            found = self.children(state, depth, length, sampling)
            total = _extended(scores[:, :, None], found.logp)
            tokens, parents = found.tokens.expand_as(total).flatten(1), above[:, :, None].expand_as(total).flatten(1)
            total = total.flatten(1)
            pool.append((tokens, parents, total))
            if depth + 1 == self.max_depth:
                break
            scores, best = total.topk(min(self._width, total.shape[1]), dim=1)
            state = self.follow(state, best // self._num_ranks, tokens.gather(1, best))
            above = best + size + 1
            size += total.shape[1]
        return _best(pool, self.max_nodes)

    def _ranked(self, logits: Tensor, position: Tensor, depths: slice, sampling: Sampling) -> Children:
        """The best of each place's tokens.

        logits (B, P, V'), overwritten · position (B, P) · depths: of the places, P or 1
        """
        token_map = self.heads.token_map
        scores = noisy(logits, token_map, position, sampling) if sampling.sampled else logits.float()
        tau, noise_tau = self._tau[:, depths, None]
        scores.div_(torch.where((sampling.temperature > 0)[:, None, None], noise_tau, tau))
        best, ids = scores.topk(self._num_ranks, dim=-1)
        logp = best - scores.logsumexp(dim=-1, keepdim=True)
        return Children(ids if token_map is None else token_map[ids], logp)


class SequentialDrafter(_ContextDrafter[Tensor]):
    """Heads that have start, advance and logits (SequentialHeads, HydraHeads): each beam has its own logits."""

    most_ranks = 8

    def beams(self, max_nodes: int) -> int:
        return min(
            8, max(2, (max_nodes + 1) // 4)
        )  # each costs a pass of the cell and V' logits; 16 gain half a percent

    def begin(self, hidden: Tensor, pending: Tensor, length: Tensor, sampling: Sampling) -> Tensor:
        return self.heads.start(hidden, pending)[:, None]  # (B, W, S)

    def children(self, state: Tensor, depth: int, length: Tensor, sampling: Sampling) -> Children:
        logits = self.heads.logits(state.flatten(0, 1)).unflatten(0, state.shape[:2])
        position = (length + 1 + depth)[:, None].expand(-1, state.shape[1])
        return self._ranked(logits, position, slice(depth, depth + 1), sampling)

    def follow(self, state: Tensor, beam: Tensor, tokens: Tensor) -> Tensor:
        state = state.gather(1, beam[:, :, None].expand(-1, -1, state.shape[2]))
        return self.heads.advance(state.flatten(0, 1), tokens.flatten()).unflatten(0, beam.shape)


class ParallelDrafter(_ContextDrafter[Children]):
    """Medusa heads (Cai et al., 2401.10774): a depth's children are the same below every node, so that one top-k of
    each head serves all beams. With R candidates a head, the search is exact."""

    most_ranks = NUM_RANKS

    def beams(self, max_nodes: int) -> int:
        """A depth's parents are its best nodes, and each has a child in the tree: M / 2 parents at most."""
        return max(1, max_nodes // 2)

    def begin(self, hidden: Tensor, pending: Tensor, length: Tensor, sampling: Sampling) -> Children:
        """All depths at once: (B, D, R)."""
        logits = self.heads.logits(hidden)[:, : self.max_depth]
        position = length[:, None] + 1 + torch.arange(self.max_depth, device=length.device)
        return self._ranked(logits, position, slice(self.max_depth), sampling)

    def children(self, state: Children, depth: int, length: Tensor, sampling: Sampling) -> Children:
        return Children(state.tokens[:, depth, None], state.logp[:, depth, None])

    def follow(self, state: Children, beam: Tensor, tokens: Tensor) -> Children:
        return state


def drafter_of(heads: Any, info: HeadsInfo, tree: str) -> Drafter:
    """A tree of each step's own; but a user's tree file (`tree`: EngineConfig's) places the candidates of parallel
    heads by rank."""
    if info.family != "medusa":
        return SequentialDrafter(heads, info.tau, info.noise_tau)
    if tree != "auto" and not tree.isdigit():
        return MedusaDrafter(heads, info.num_heads, NUM_RANKS, ())  # size() brings the file's paths
    return ParallelDrafter(heads, info.tau, info.noise_tau)


def _extended(scores: Tensor, logp: Tensor) -> Tensor:
    """Log-probabilities of the children (B, W, R): scores (B, W, 1) of the parents, logp (B, W, R) or (B, 1, R).

    Always below the parent's, also where rounding would swallow the difference: what holds a child, and each prefix of
    it, then holds the parent.
    """
    logp = torch.nan_to_num(logp, nan=NEVER, neginf=NEVER)
    return torch.minimum(scores + logp, scores * (1 + 1e-6) - STEP_COST)


def _best(pool: list[tuple[Tensor, Tensor, Tensor]], max_nodes: int) -> HeadNodes:
    """The M most probable nodes of the pool, best first. A child scores below its parent, so they form a tree."""
    tokens, parents, scores = (torch.cat(parts, dim=1) for parts in zip(*pool, strict=True))
    depth_of = [torch.full((part[0].shape[1],), d + 1, device=tokens.device) for d, part in enumerate(pool)]
    best = scores.topk(max_nodes, dim=1).indices
    place = torch.zeros(tokens.shape[0], tokens.shape[1] + 1, dtype=torch.int64, device=tokens.device)
    place.scatter_(1, best + 1, torch.arange(1, max_nodes + 1, device=tokens.device).expand_as(best))
    new_parents = place.gather(1, parents.gather(1, best))
    return HeadNodes(tokens.gather(1, best), new_parents, torch.cat(depth_of)[best])
