"""What the heads are worth: ranks of the true tokens, the tables that choose trees, and a forecast of acceptance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.noise import gumbel
from ..model.tree import NUM_RANKS, RankPath, most_probable
from .loss import Output

SIZES = (4, 8, 16, 32, 64)  # nodes, the root counts


@dataclass(frozen=True)
class Ranks:
    """rank (R, D): where the true token stands among a depth's candidates, 0 best; NONE where it cannot be drafted;
    PAST_END behind the sequence's end · count (B): rows of each sequence, side by side · looped (B): the answer is a
    loop."""

    rank: np.ndarray
    count: np.ndarray
    looped: np.ndarray

    def joined(self, other: Ranks) -> Ranks:
        pairs = ((self.rank, other.rank), (self.count, other.count), (self.looped, other.looped))
        return Ranks(*(np.concatenate(pair) for pair in pairs))

    def chosen(self, sequences: np.ndarray) -> Ranks:
        """Only the sequences where the mask (B) is true."""
        return Ranks(self.rank[np.repeat(sequences, self.count)], self.count[sequences], self.looped[sequences])


NONE, PAST_END = 1 << 30, -1


@torch.no_grad()
def true_ranks(
    features: Tensor,
    targets: Tensor,
    left: Tensor,
    output: Output,
    token_map: Tensor | None,
    vocab: int,
    *,
    temperature: float = 0.0,
    seed: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """(R, D) ranks of the targets (R, D; base ids) among the candidates that `features` (R, D, H) give.

    temperature > 0: ranked as the drafter does, log q / T + G with the noise of (seed (R), position (R) + d), where
    `position` is depth 0's. Equal logits are ranked by their index, as good as any.
    """
    index = _draft_index(token_map, vocab, targets)
    ids = torch.arange(output.weight.shape[0], device=targets.device) if token_map is None else token_map
    out = torch.empty_like(targets)
    for depth in range(targets.shape[1]):
        for start in range(0, len(targets), output.chunk()):
            part = slice(start, start + output.chunk())
            z = output.logits(features[part, depth])
            if temperature > 0:
                assert seed is not None
                assert position is not None
                z = z.float() / temperature + gumbel(seed[part, None], position[part, None] + depth, ids)
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
    """Per depth, the share of all positions whose true token is among the first `top` candidates."""
    out = []
    for column in ranks.rank.T:
        there = column[column != PAST_END]
        out.append(float((there < top).mean()) if len(there) else 0.0)
    return out


def conditional_ranks(ranks: Ranks, num_ranks: int = NUM_RANKS) -> list[list[float]]:
    """P(rank r at depth d is right | the tokens before were among their depths' candidates), never rising in r."""
    alive = np.ones(len(ranks.rank), bool)
    table = []
    for column in ranks.rank.T:
        alive = alive & (column != PAST_END)
        counts = np.bincount(column[alive & (column < num_ranks)], minlength=num_ranks)[:num_ranks]
        shares = np.maximum(counts / max(1, int(alive.sum())), 1e-6)  # a tree may still need so unlikely a node
        table.append([float(share) for share in np.minimum.accumulate(shares)])
        alive = alive & (column < num_ranks)
    return table


def accepted(ranks: np.ndarray, paths: Sequence[RankPath]) -> np.ndarray:
    """(R, D) ranks → (R): how many draft tokens a tree of these paths has right at each row."""
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
    """Acceptance with this static tree, by walking each held-out answer as the engine would: a step that has `a` draft
    tokens right emits a + 1 and goes on from there. (completion tokens - 1) / steps; the root's own token counts."""
    gain = accepted(ranks.rank, paths)
    steps = first = 0
    for count in ranks.count.tolist():
        row = 0
        while row < count:
            row += int(gain[first + row]) + 1
            steps += 1
        first += count
    return float(ranks.count.sum()) / steps if steps else 1.0


def forecast(ranks: Ranks, table: Sequence[Sequence[float]] | None = None) -> dict[int, float]:
    """Acceptance by tree size, each with the most probable nodes under `table` (default: the ranks' own)."""
    table = table or conditional_ranks(ranks)
    return {size: tokens_per_step(ranks, most_probable(table, size)) for size in SIZES}


@torch.no_grad()
def fit_tau(features: Tensor, targets: Tensor, output: Output, token_map: Tensor | None, vocab: int) -> float:
    """The temperature at which softmax(log q / tau) predicts the true token best (features (R, H), targets (R)): what
    turns a depth's scores into probabilities, so that nodes of different depths compare."""
    index = _draft_index(token_map, vocab, targets)
    features, index = features[index >= 0][: output.chunk()], index[index >= 0][: output.chunk()]
    if not len(index):
        return 1.0
    z = output.logits(features).float()

    def cost(log_tau: float) -> float:
        scaled = z / math.exp(log_tau)
        return float((scaled.logsumexp(dim=-1) - scaled.gather(1, index[:, None])[:, 0]).mean())

    low, high = math.log(0.1), math.log(10.0)
    for _ in range(24):  # the cost has one minimum in 1 / tau (it is convex there), so thirds close in on it
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if cost(a) < cost(b) else (a, high)
    return math.exp((low + high) / 2)
