"""Candidates for the next step's tree, from parallel (Medusa) heads: the k best tokens of each head, ranked by the
request's own noise."""

from __future__ import annotations

from typing import Protocol

import torch

from .filters import Sampling
from .noise import gumbel


class Drafter(Protocol):
    """What fills the heads' part of a tree."""

    num_heads: int
    num_ranks: int

    def candidates(
        self, slots: torch.Tensor, hidden: torch.Tensor, pending: torch.Tensor, length: torch.Tensor, sampling: Sampling
    ) -> torch.Tensor:
        """slots (B) · hidden (B, H) of the last accepted node · pending (B), which stands at position `length` (B)
        → (B, num_heads, num_ranks) base token ids, best first; -1 empty"""


class MedusaDrafter:
    """Head d predicts the token at position length + 1 + d (Cai et al., "Medusa", 2401.10774)."""

    def __init__(self, heads, num_heads: int, num_ranks: int) -> None:
        """heads: a MedusaHeads module; the first `num_heads` heads with `num_ranks` candidates each are used."""
        self.heads, self.num_heads, self.num_ranks = heads, num_heads, num_ranks

    def candidates(self, slots, hidden, pending, length, sampling):
        logits = self.heads.logits(hidden)[:, : self.num_heads]
        return rank(logits, self.heads.token_map, length + 1, sampling, self.num_ranks)


def rank(
    logits: torch.Tensor, token_map: torch.Tensor | None, position: torch.Tensor, sampling: Sampling, num_ranks: int
) -> torch.Tensor:
    """The best `num_ranks` tokens for positions `position` … `position` + K - 1 (Gumbel coupling at temperature > 0).

    logits (B, K, V') · token_map (V') base ids or None · position (B) → (B, K, num_ranks) base ids
    """
    if sampling.sampled:
        hot = (sampling.temperature > 0)[:, None, None]
        ids = torch.arange(logits.shape[-1], device=logits.device) if token_map is None else token_map
        where = position[:, None, None] + torch.arange(logits.shape[1], device=logits.device)[None, :, None]
        noisy = logits.float() / torch.where(hot, sampling.temperature[:, None, None], 1.0)
        noisy = noisy + gumbel(sampling.seed[:, None, None], where, ids)
        logits = torch.where(hot, noisy, logits.float())
    best = logits.topk(num_ranks, dim=-1).indices
    return best if token_map is None else token_map[best]
