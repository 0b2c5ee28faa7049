"""Per-context trees: the N most probable nodes of this step, best first, found depth by depth with static shapes.

As in EAGLE-2 (Li et al., 2406.16858), for both families. A node's probability is the product of p_d(token) along its
path. The heads' own distribution q is a soft label, not such a probability; temperatures turn it into one:

    greedy   p_d = softmax(log q / tau_d)                      how often a candidate is the base's first choice
    T > 0    p_d = softmax((log q / T + G) / noise_tau_d)      the noise favours a few tokens: p_d is sharper than q

tau and noise_tau are fitted in calibration (1 until then). They never reorder the children of one parent; they do
reorder nodes of different parents and depths.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ...errors import LoadError
from ..kernels import Kernels
from ..sampling.filters import Sampling
from ..torch_kernels import TorchKernels
from .draft import Drafter, MedusaDrafter
from .heads import HeadsInfo
from .pool import Children
from .tree import NUM_RANKS, HeadNodes, RankPath

State = TypeVar("State")


class _ContextDrafter(Generic[State]):
    """The search that both families share. Each family finds a beam's children: begin, children, follow."""

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
        ranks: HeadsInfo's, from which a tree's acceptance is forecast"""
        self.ranks = ranks
        self.heads, depths = heads, heads.max_depth
        self._num_ranks = min(num_ranks or self.most_ranks, heads.output.vocab_size)
        both = [[*(given or ()), *[1.0] * depths][:depths] for given in (tau, noise_tau)]
        self._kernels: Kernels = TorchKernels()
        self._at_once: Any = None  # the search in one call, if the machine has it for these heads
        self.tau = torch.tensor(both, dtype=torch.float32, device=heads.output.device)  # (2, D)
        self.size(63, None)

    def using(self, kernels: Kernels) -> _ContextDrafter[State]:
        """A copy that uses a machine's kernels. Both share the heads, which take its norm and must not change then."""
        made = copy.copy(self)
        if hasattr(self.heads, "use_norm"):
            self.heads.use_norm(kernels.rms_norm)
        made._kernels, made._at_once = kernels, self._search_at_once(kernels)
        return made

    def _search_at_once(self, kernels: Kernels) -> Any:
        return None

    def size(self, max_nodes: int, paths: Sequence[RankPath] | None) -> None:
        if paths is not None:
            raise LoadError("a tree file is for parallel heads; these heads choose a new tree at each step.")
        self._asked = max_nodes
        widths, pool_size = self._search(max_nodes)
        self.max_depth, self.max_nodes = len(widths), min(max_nodes, pool_size)

    def _search(self, nodes: int) -> tuple[list[int], int]:
        """For a tree of `nodes`: the number of beams after each depth (0 after the last), and the number of all nodes
        that the search finds."""
        # a tree of 7 nodes is rarely deeper than 3 or 4, and each depth costs a pass of the output layer
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
        """The best next tokens of each beam. depth: the beams' own, 0 for the root."""
        raise NotImplementedError

    def follow(self, state: State, beam: Tensor, tokens: Tensor) -> State:
        """The state of W' new beams. beam (B, W'): which of the W beams each continues · tokens (B, W'): by which."""
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
        if self._at_once is not None and not sampling.sampled:
            return self._at_once.run(hidden, pending, widths, pool_size, nodes)
        state = self.begin(hidden, pending, length, sampling)
        pool = self._kernels.new_pool(pending.shape[0], pool_size, pending.device)
        for depth, width in enumerate(widths):
            found = self.children(state, depth, length, sampling)
            beam, tokens = pool.grow(found.tokens, found.logp, width)
            if width:
                state = self.follow(state, beam, tokens)
        return pool.best(min(nodes, pool_size))

    def _ranked(self, logits: Tensor, depth: int | None, length: Tensor, sampling: Sampling) -> Children:
        """The best tokens of P positions. logits (B, P, V'), overwritten: of one depth, or (None) of 0 … P - 1"""
        tau, token_map = self.tau, self.heads.token_map
        return self._kernels.top_children(logits, depth, length, tau, token_map, sampling, self._num_ranks)


class SequentialDrafter(_ContextDrafter[Tensor]):
    """Heads that have start, advance and logits (SequentialHeads, HydraHeads): each beam has its own logits."""

    most_ranks = 8

    def beams(self, max_nodes: int) -> int:
        # each beam costs a pass of the cell and V' logits; 16 beams gain half a percent
        return min(8, max(2, (max_nodes + 1) // 4))

    def begin(self, hidden: Tensor, pending: Tensor, length: Tensor, sampling: Sampling) -> Tensor:
        return self.heads.start(hidden, pending)[:, None]  # (B, W, S)

    def _search_at_once(self, kernels: Kernels) -> Any:
        return kernels.search_at_once(self.heads, self.tau[0], self._num_ranks)

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
    """The drafter of these heads. It chooses a new tree at each step; but a tree file (`tree`: EngineConfig's) fixes
    the ranks of parallel heads' candidates."""
    if info.family != "medusa":
        return SequentialDrafter(heads, info.tau, info.noise_tau, ranks=info.ranks)
    if tree != "auto" and not tree.isdigit():
        return MedusaDrafter(heads, info.num_heads, NUM_RANKS, ())  # size() brings the file's paths
    return ParallelDrafter(heads, info.tau, info.noise_tau, ranks=info.ranks)
