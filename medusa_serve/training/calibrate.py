"""How good heads are: ranks of the true tokens, calibration, and a forecast of acceptance with static trees.

A forecast walks given answers with one tree of rank paths for all steps. The engine makes a better tree for each step,
so it mostly accepts more than the forecast says. report.py asks the engine itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model.drafting.tree import NUM_RANKS, RankPath, most_probable
from ..model.sampling.noise import gumbel
from .loss import Output

SIZES = (4, 8, 16, 24, 32, 64)  # nodes, the root counts
SAMPLED = 0.7  # acceptance is reported at this temperature and greedily
FIT_ROWS = 2048  # rows that fit a tau: its error is then about 2 %
TAUS = tuple(0.05 * 200 ** (i / 26) for i in range(27))  # 0.05 … 10: a fit looks in this range


@dataclass(frozen=True)
class Ranks:
    """rank (R, D): the true token's rank among a depth's candidates, 0 is the best; NONE where it cannot be drafted;
    PAST_END after the sequence's end · count (B): rows of each sequence, which follow one another in `rank`"""

    rank: np.ndarray
    count: np.ndarray

    def chosen(self, sequences: np.ndarray) -> Ranks:
        """Only the sequences where the mask (B) is true."""
        return Ranks(self.rank[np.repeat(sequences, self.count)], self.count[sequences])


NONE, PAST_END = 1 << 30, -1


class Noise(NamedTuple):
    """What the answers of R rows were sampled with, (R) each: temperature · seed · position of depth 0's target."""

    temperature: Tensor
    seed: Tensor
    position: Tensor

    def of(self, rows: slice | Tensor) -> Noise:
        return Noise(*(each[rows] for each in self))

    def scores(self, z: Tensor, depth: int, ids: Tensor) -> Tensor:
        """log q / T + G, as the drafter ranks: z (R, V') logits of a depth, ids (V') → (R, V')."""
        return z.float() / self.temperature[:, None] + gumbel(self.seed[:, None], self.position[:, None] + depth, ids)


@torch.no_grad()
def true_ranks(
    features: Tensor,
    targets: Tensor,
    left: Tensor,
    output: Output,
    token_map: Tensor | None,
    vocab: int,
    noise: Noise | None = None,
) -> Tensor:
    """(R, D) ranks of the targets (R, D; base ids) among the candidates that `features` (R, D, H) give, with the noise
    of sampled answers if there is any. Equal logits are ranked by their index."""
    index = _draft_index(token_map, vocab, targets)
    ids = torch.arange(output.weight.shape[0], device=targets.device) if token_map is None else token_map
    out = torch.empty_like(targets)
    for depth in range(targets.shape[1]):
        for start in range(0, len(targets), output.chunk()):
            part = slice(start, start + output.chunk())
            z = output.logits(features[part, depth])
            if noise is not None:
                z = noise.of(part).scores(z, depth, ids)
            true = index[part, depth].clamp(min=0)[:, None]
            score = z.gather(1, true)
            before = torch.arange(z.shape[1], device=z.device) < true
            rank = ((z > score) | ((z == score) & before)).sum(dim=1)
            out[part, depth] = torch.where(index[part, depth] < 0, NONE, rank)
    past = torch.arange(targets.shape[1], device=left.device) >= left[:, None]
    return torch.where(past, PAST_END, out)


def _draft_index(token_map: Tensor | None, vocab: int, targets: Tensor) -> Tensor:
    """Base ids → indexes of the draft vocabulary, -1 where a token is not in it."""
    if token_map is None:
        return targets
    table = torch.full((vocab,), -1, dtype=torch.int64, device=targets.device)
    table[token_map] = torch.arange(len(token_map), device=targets.device)
    return table[targets]


def top_shares(ranks: Ranks, top: int) -> list[float]:
    """Per depth, the share of all positions that have their true token among the first `top` candidates."""
    out = []
    for column in ranks.rank.T:
        there = column[column != PAST_END]
        out.append(float((there < top).mean()) if len(there) else 0.0)
    return out


def conditional_ranks(ranks: Ranks, num_ranks: int = NUM_RANKS) -> list[list[float]]:
    """P(rank r at depth d is right | the tokens before it were candidates of their depths), never rising in r."""
    alive = np.ones(len(ranks.rank), bool)
    table = []
    for column in ranks.rank.T:
        alive = alive & (column != PAST_END)
        counts = np.bincount(column[alive & (column < num_ranks)], minlength=num_ranks)[:num_ranks]
        shares = np.maximum(counts / max(1, int(alive.sum())), 1e-6)  # a large tree may need such nodes
        table.append([float(share) for share in np.minimum.accumulate(shares)])
        alive = alive & (column < num_ranks)
    return table


def accepted(ranks: np.ndarray, paths: Sequence[RankPath]) -> np.ndarray:
    """(R, D) ranks → (R): how many draft tokens of a tree of these paths are right at each row."""
    index = {(): 0} | {path: number for number, path in enumerate(paths, 1)}
    width = max((path[-1] for path in paths), default=0) + 1
    child = np.zeros((len(index), width + 1), np.int64)  # 0: no such node; the last column takes all other ranks
    for path, number in index.items():
        if path:
            child[index[path[:-1]], path[-1]] = number
    node = np.zeros(len(ranks), np.int64)
    alive = np.ones(len(ranks), bool)
    count = np.zeros(len(ranks), np.int64)
    for column in ranks.T:
        node = child[node, np.where((column >= 0) & (column < width), column, width)]
        alive = alive & (node > 0)
        count += alive
        node = np.where(alive, node, 0)
    return count


def tokens_per_step(ranks: Ranks, paths: Sequence[RankPath]) -> float:
    """Acceptance with this static tree, (completion tokens - 1) / steps. It walks each held-out answer as the engine
    would: a step with num_accepted right draft tokens emits num_accepted + 1 and goes on from there."""
    num_accepted = accepted(ranks.rank, paths)
    steps = first = 0
    for count in ranks.count.tolist():
        row = 0
        while row < count:
            row += int(num_accepted[first + row]) + 1
            steps += 1
        first += count
    return float(ranks.count.sum()) / steps if steps else 1.0


def forecast(ranks: Ranks, table: Sequence[Sequence[float]] | None = None) -> dict[int, float]:
    """Acceptance by size of a static tree: the most probable nodes under `table` (default: the ranks' own)."""
    table = table or conditional_ranks(ranks)
    return {size: tokens_per_step(ranks, most_probable(table, size)) for size in SIZES}


@torch.no_grad()
def fit_tau(
    features: Tensor,
    targets: Tensor,
    output: Output,
    token_map: Tensor | None,
    vocab: int,
    noise: Noise | None = None,
    depth: int = 0,
) -> float:
    """The temperature tau at which softmax(log q / tau) predicts the true tokens best; for sampled answers
    softmax((log q / T + G) / tau). It makes probabilities of a depth's scores, so that nodes of all depths compare.

    features (R, H), targets (R; base ids) of one depth. With tau < 1 the heads are right more often than q says.
    Returns 1.0 if there are no rows.
    """
    index = _draft_index(token_map, vocab, targets)
    rows = (index >= 0).nonzero()[:, 0]
    if not len(rows):
        return 1.0
    rows = rows[:: 1 + (len(rows) - 1) // FIT_ROWS]  # spread over all answers
    ids = torch.arange(output.weight.shape[0], device=targets.device) if token_map is None else token_map
    costs = torch.zeros(len(TAUS), dtype=torch.float64, device=targets.device)
    for part in rows.split(output.chunk()):
        z = output.logits(features[part])
        z = z.float() if noise is None else noise.of(part).scores(z, depth, ids)
        true = z.gather(1, index[part, None])[:, 0]
        costs += torch.stack([((z / tau).logsumexp(dim=-1) - true / tau).double().sum() for tau in TAUS])
    return _lowest(costs.tolist())


def _lowest(costs: Sequence[float]) -> float:
    """The tau of least cost: the minimum of the parabola, in log tau, through the best of TAUS and its neighbours."""
    at = min(range(1, len(costs) - 1), key=lambda i: costs[i])  # one minimum: the costs are convex in 1 / tau
    before, here, after = costs[at - 1 : at + 2]
    bend = before - 2 * here + after
    shift = (before - after) / (2 * bend) if bend > 0 else 0.0
    return TAUS[at] * (TAUS[1] / TAUS[0]) ** max(-1.0, min(1.0, shift))
