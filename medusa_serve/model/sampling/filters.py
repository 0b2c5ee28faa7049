"""A request's own choice of the next token: temperature, top-k, top-p, min-p in transformers' order, then keyed noise.

There is no full sort. If the largest 1,024 logits have enough mass for top-p, they decide; otherwise bisection over the
ordered bit patterns of float32 finds the exact threshold. Tokens that tie with the last kept one are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .noise import gumbel
from .penalties import Penalties

WINDOW = 1024  # topk(1024) of 49k logits costs a tenth of a sort on a CPU


class Sampling(NamedTuple):
    """The sampling parameters of B rows. `sampled`, `filtered`, `logprobs`: whether any row needs noise, or
    top-k/top-p/min-p, or log-probabilities · penalties: None if no row has any."""

    temperature: torch.Tensor  # (B) float32; 0 is greedy
    top_k: torch.Tensor  # (B) int64; 0 is off
    top_p: torch.Tensor  # (B) float32
    min_p: torch.Tensor  # (B) float32
    seed: torch.Tensor  # (B) int64
    sampled: bool
    filtered: bool
    penalties: Penalties | None = None
    logprobs: bool = False


def pick(logits: torch.Tensor, sampling: Sampling, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each row for the given absolute position.

    logits (B, V) · position (B) → token (B) int64, finite (B) bool: False if the largest logit is NaN or infinite
    """
    best, greedy = logits.max(dim=-1)
    finite = torch.isfinite(best)
    if not sampling.sampled:
        return greedy, finite
    hot = sampling.temperature > 0
    x = logits.float() / torch.where(hot, sampling.temperature, 1.0)[:, None]
    seed, position = sampling.seed[:, None], position[:, None]
    if sampling.filtered:
        top, ids = x.topk(min(WINDOW, x.shape[-1]), dim=-1)
        threshold = keep_threshold(x, top, sampling)
        # If no token outside the window is kept, noise for the window alone gives the same winner.
        if _all(hot.logical_not() | (threshold > top[:, -1]) | (top.shape[-1] == x.shape[-1])):
            scores = top + gumbel(seed, position, ids)
            winner = scores.masked_fill(top < threshold[:, None], -torch.inf).argmax(dim=-1)
            return torch.where(hot, ids.gather(1, winner[:, None])[:, 0], greedy), finite
        x = x.masked_fill(x < threshold[:, None], -torch.inf)
    ids = torch.arange(x.shape[-1], device=x.device)
    return torch.where(hot, (x + gumbel(seed, position, ids)).argmax(dim=-1), greedy), finite


def keep_threshold(x: torch.Tensor, top: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The smallest scaled logit (B) that top-k, then top-p, then min-p keep.

    x (B, V) logits over temperature, float32 · top (B, W) its largest values, descending
    """
    width = top.shape[-1]
    k = torch.where(sampling.top_k > 0, sampling.top_k, x.shape[-1]).clamp(max=x.shape[-1])
    kth = top.gather(1, (k.clamp(max=width) - 1)[:, None])[:, 0]
    beyond = (k > width) & (k < x.shape[-1])
    kth = torch.where(k < x.shape[-1], kth, -torch.inf)
    if _any(beyond):
        searched = _search(x, torch.ones_like(x), k.float())
        kth = torch.where(beyond, searched, kth)

    mass_x = x.masked_fill(x < kth[:, None], -torch.inf)
    total = mass_x.logsumexp(dim=-1, keepdim=True)
    shares = (top.masked_fill(top < kth[:, None], -torch.inf) - total).exp()
    above = shares.cumsum(dim=-1) - shares
    # A token stays while the mass strictly above it is below top_p, as in transformers' TopPLogitsWarper.
    kept = (above < sampling.top_p[:, None]) & (shares > 0)
    last = (kept.sum(dim=-1) - 1).clamp(min=0)
    nucleus = top.gather(1, last[:, None])[:, 0]
    on = sampling.top_p < 1.0
    short = on & (shares.sum(dim=-1) < sampling.top_p) & (width < x.shape[-1])
    if _any(short):
        searched = _search(x, (mass_x - total).exp(), sampling.top_p)
        nucleus = torch.where(short, searched, nucleus)
    nucleus = torch.where(on, nucleus, -torch.inf)

    floor = top[:, 0] + sampling.min_p.clamp(min=1e-38).log()
    floor = torch.where(sampling.min_p > 0, floor, -torch.inf)
    return torch.maximum(torch.maximum(kth, nucleus), floor)


def _search(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The smallest value of x (B, V) such that the weight of all strictly larger ones is below target (B)."""
    bits = x.view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    low = torch.full_like(target, -(2**31), dtype=torch.int64)
    high = torch.full_like(low, 2**31 - 1)
    for _ in range(32):
        middle = (low + high) >> 1
        enough = (weight * (order > middle[:, None])).sum(dim=-1) < target
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle + 1)
    low = low.to(torch.int32)
    return (low ^ ((low >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _any(flags: torch.Tensor) -> bool:
    """On a CPU: whether the rare path is needed. On a GPU: always run it, since asking would stall the device."""
    return True if flags.is_cuda else bool(flags.any())


def _all(flags: torch.Tensor) -> bool:
    """On a CPU: whether the cheap path suffices. On a GPU: never take it, since asking would stall the device."""
    return False if flags.is_cuda else bool(flags.all())
