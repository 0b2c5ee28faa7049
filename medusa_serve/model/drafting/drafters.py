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

from ...errors import LoadError
from ..forward.attention import has_numba
from ..gpu import attention as splitk
from ..gpu.search import FusedPool, top_children
from ..sampling.filters import Sampling
from .draft import Drafter, MedusaDrafter, noisy
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


class Pool:
    """All nodes found so far, and which of them are beams, to get children of their own.

    tokens, parents (index in the pool + 1; 0 is the root), depths (B, size) int64 · scores (B, size): log-probabilities
    """

    def __init__(self, rows: int, size: int, device: torch.device) -> None:
        self.tokens, self.parents, self.depths = (torch.empty(rows, 0, dtype=torch.int64, device=device),) * 3
        self.scores = torch.empty(rows, 0, dtype=torch.float32, device=device)
        self._beams = torch.zeros(rows, 1, dtype=torch.float32, device=device)
        self._above = torch.zeros(rows, 1, dtype=torch.int64, device=device)

    def grow(self, tokens: Tensor, logp: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The beams' children (B, W or 1, R) join; the best `width` of them become the beams: → which beam each goes on
        from, and its token, (B, width) both.

        A child's score is below its parent's also where rounding would swallow the difference: what holds a child, and
        each prefix of it, then holds the parent.
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


class _ContextDrafter(Generic[State]):
    """The search that both families share. A family says how a beam's children are found: begin, children, follow."""

    most_ranks: int  # children that one node may have

    def __init__(
        self,
        heads: Any,
        tau: Sequence[float] | None = None,
        noise_tau: Sequence[float] | None = None,
        num_ranks: int | None = None,
        *,
        ranks: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """heads: attached to the base · tau, noise_tau: per depth, of greedy rows and of rows at T > 0 · num_ranks R ·
        ranks: as HeadsInfo's, which tell what to expect of a tree"""
        self.ranks = ranks
        self.heads, depths = heads, heads.max_depth
        self._num_ranks = min(num_ranks or self.most_ranks, heads.output.vocab_size)
        both = [[*(given or ()), *[1.0] * depths][:depths] for given in (tau, noise_tau)]
        self.native: Any = None  # NativeDraft, once there is one
        self.tau = torch.tensor(both, dtype=torch.float32, device=heads.output.device)  # (2, D)
        self.size(63, None)

    def size(self, max_nodes: int, paths: Sequence[RankPath] | None) -> None:
        if paths is not None:
            raise LoadError(
                "a tree file places candidates of parallel heads; these choose a tree of their own each step."
            )
        self._asked = max_nodes
        widths, pool_size = self._search(max_nodes)
        self.max_depth, self.max_nodes = len(widths), min(max_nodes, pool_size)

    def _search(self, nodes: int) -> tuple[list[int], int]:
        """For a tree of so many nodes: the number of beams after each depth, none after the last, and of all nodes that
        are looked at."""
        # of 7 nodes none is likely to stand deeper than 3 or 4, and each depth costs a pass of the output layer
        depths, widths, pool, beams = min(self.heads.max_depth, (nodes + 1).bit_length()), [], 0, 1
        for depth in range(1, depths + 1):
            pool += beams * self._num_ranks
            beams = min(self.beams(nodes), beams * self._num_ranks) if depth < depths else 0
            widths.append(beams)
        return widths, pool

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

    def draft(
        self,
        slots: Tensor,
        hidden: Tensor,
        pending: Tensor,
        length: Tensor,
        sampling: Sampling,
        nodes: int | None = None,
    ) -> HeadNodes:
        nodes = self._asked if nodes is None or nodes >= self.max_nodes else nodes
        widths, pool_size = self._search(nodes)
        if self.native is not None and not sampling.sampled:
            return self.native.run(hidden, pending, widths, pool_size, nodes)
        state = self.begin(hidden, pending, length, sampling)
        fused = splitk.available(pending.device)
        pool = (FusedPool if fused else Pool)(pending.shape[0], pool_size, pending.device)
        for depth, width in enumerate(widths):
            found = self.children(state, depth, length, sampling)
            beam, tokens = pool.grow(found.tokens, found.logp, width)
            if width:
                state = self.follow(state, beam, tokens)
        count = min(nodes, pool_size)
        return pool.best(count) if isinstance(pool, FusedPool) else best_nodes(pool, count)

    def _ranked(self, logits: Tensor, depth: int | None, length: Tensor, sampling: Sampling) -> Children:
        """The best of each place's tokens. logits (B, P, V'), overwritten: of one depth, or (None) of 0 … P - 1"""
        token_map = self.heads.token_map
        if splitk.available(logits.device):
            return Children(*top_children(logits, depth, length, self.tau, token_map, sampling, self._num_ranks))
        if not sampling.sampled and has_numba() and not torch.compiler.is_compiling():
            from ..cpu.search import best_children, fits

            if fits(logits):
                tau = self.tau[0, : logits.shape[1]] if depth is None else self.tau[0, depth : depth + 1]
                ids, logp = best_children(logits, tau, self._num_ranks)
                return Children(ids if token_map is None else token_map[ids], logp)
        depths = slice(logits.shape[1]) if depth is None else slice(depth, depth + 1)
        position = length[:, None] + 1 + torch.arange(self.heads.max_depth, device=length.device)[depths]
        scores = logits.float()
        if sampling.sampled:
            scores = noisy(logits, token_map, position.expand(-1, logits.shape[1]), sampling)
        tau, noise_tau = self.tau[:, depths, None]
        scores.div_(torch.where((sampling.temperature > 0)[:, None, None], noise_tau, tau))
        best, ids = scores.topk(self._num_ranks, dim=-1)
        logp = best - scores.logsumexp(dim=-1, keepdim=True)
        return Children(ids if token_map is None else token_map[ids], logp)


class SequentialDrafter(_ContextDrafter[Tensor]):
    """Heads that have start, advance and logits (SequentialHeads, HydraHeads): each beam has its own logits."""

    most_ranks = 8

    def beams(self, max_nodes: int) -> int:
        # each costs a pass of the cell and V' logits; 16 gain half a percent
        return min(8, max(2, (max_nodes + 1) // 4))

    def begin(self, hidden: Tensor, pending: Tensor, length: Tensor, sampling: Sampling) -> Tensor:
        return self.heads.start(hidden, pending)[:, None]  # (B, W, S)

    def use_kernels(self) -> None:
        """Draft greedily by one call, where heads of this kind can. They must stay as they are."""
        from ..cpu.draft import NativeDraft

        if NativeDraft.fits(self.heads):
            self.native = NativeDraft(self.heads, self.tau[0], self._num_ranks, (STEP_COST, NEVER))

    def children(self, state: Tensor, depth: int, length: Tensor, sampling: Sampling) -> Children:
        logits = self.heads.logits(state.flatten(0, 1)).unflatten(0, state.shape[:2])
        return self._ranked(logits, depth, length, sampling)

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
        return self._ranked(self.heads.logits(hidden)[:, : self.max_depth], None, length, sampling)

    def children(self, state: Children, depth: int, length: Tensor, sampling: Sampling) -> Children:
        return Children(state.tokens[:, depth, None], state.logp[:, depth, None])

    def follow(self, state: Children, beam: Tensor, tokens: Tensor) -> Children:
        return state


def drafter_of(heads: Any, info: HeadsInfo, tree: str) -> Drafter:
    """A tree of each step's own; but a user's tree file (`tree`: EngineConfig's) places the candidates of parallel
    heads by rank."""
    if info.family != "medusa":
        return SequentialDrafter(heads, info.tau, info.noise_tau, ranks=info.ranks)
    if tree != "auto" and not tree.isdigit():
        return MedusaDrafter(heads, info.num_heads, NUM_RANKS, ())  # size() brings the file's paths
    return ParallelDrafter(heads, info.tau, info.noise_tau, ranks=info.ranks)


def best_nodes(pool: Pool, max_nodes: int) -> HeadNodes:
    """The M most probable nodes of the pool, best first. A child scores below its parent, so they form a tree."""
    best = pool.scores.topk(max_nodes, dim=1).indices
    place = torch.zeros(best.shape[0], pool.scores.shape[1] + 1, dtype=torch.int64, device=best.device)
    place.scatter_(1, best + 1, torch.arange(1, max_nodes + 1, device=best.device).expand_as(best))
    parents = place.gather(1, pool.parents.gather(1, best))
    return HeadNodes(pool.tokens.gather(1, best), parents, pool.depths.gather(1, best))
