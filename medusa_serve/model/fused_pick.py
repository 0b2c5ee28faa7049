"""Each node's own choice of the next token as one Triton kernel, a program for each node: filters.pick for all nodes of
a step at once. What a node picks depends on its logits and its position alone, so the walk need not be waited for.

Thresholds of top-k and top-p are found by bisection over the ordered bit patterns of float32, as filters._search does.
For top-p the tokens that can be above the threshold are set aside first (those below them weigh less than 1 - p
together), usually some hundreds, and the search never sees the others; else, and for top-k, it takes two bits a pass
over all logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .filters import Sampling

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none; `splitk.available` says so
    triton = None

TILE = 4096  # logits at once
ASIDE = 4096  # tokens that may be set aside for top-p


def pick_nodes(logits: Tensor, sampling: Sampling, position: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, N, V) · position (B, N): of the token that is picked → token (B, N) int64, the largest logit (B, N)
    float32, NaN where there is one"""
    rows, nodes, vocab = logits.shape
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    picked = torch.empty(rows, nodes, dtype=torch.int64, device=logits.device)
    best = torch.empty(rows, nodes, dtype=torch.float32, device=logits.device)
    aside = ASIDE if sampling.filtered else 1
    values = torch.empty(rows * nodes, aside, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows * nodes, aside, dtype=torch.int32, device=logits.device)
    _pick[(rows * nodes,)](
        logits, position.contiguous(), sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p,
        sampling.seed, picked, best, values, ids, logits.stride(0), logits.stride(1), vocab,
        NODES=nodes, FILTERED=sampling.filtered, TILE=TILE, ASIDE=aside, num_warps=16,
    )  # fmt: skip
    return picked, best


if triton is not None:
    from .fused_search import _gumbel

    @triton.jit
    def _ordered(x):
        """Bit patterns of float32 in the numbers' order."""
        bits = x.to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)

    @triton.jit
    def _heavier(at, temperature, vocab, kept, peak, whole, m1, m2, m3, MASS: tl.constexpr, TILE: tl.constexpr):
        """How much lies strictly above three patterns: tokens (MASS false), or the share of those from `kept` up."""
        s1, s2, s3 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        for begin in range(0, vocab, TILE):
            index = begin + tl.arange(0, TILE)
            x = tl.load(at + index, mask=index < vocab, other=float("-inf")).to(tl.float32) / temperature
            order = _ordered(x)
            weight = (index < vocab).to(tl.float32)
            if MASS:
                weight = tl.where((index < vocab) & (order >= kept), tl.exp(x - peak) / whole, 0.0)
            s1 += tl.where(order > m1, weight, 0.0)
            s2 += tl.where(order > m2, weight, 0.0)
            s3 += tl.where(order > m3, weight, 0.0)
        return tl.sum(s1, axis=0), tl.sum(s2, axis=0), tl.sum(s3, axis=0)

    @triton.jit
    def _threshold(at, temperature, vocab, kept, peak, whole, target, MASS: tl.constexpr, TILE: tl.constexpr):
        """The smallest pattern such that what lies strictly above it weighs less than `target`."""
        low, high = kept * 0 - 2147483648, kept * 0 + 2147483647
        for _ in range(16):
            m2 = (low + high) >> 1
            m1, m3 = (low + m2) >> 1, (m2 + 1 + high) >> 1
            s1, s2, s3 = _heavier(at, temperature, vocab, kept, peak, whole, m1, m2, m3, MASS, TILE)
            below = s2 < target
            enough = tl.where(below, s1 < target, s3 < target)
            low = tl.where(below, low, m2 + 1)
            high = tl.where(below, m2, high)
            middle = tl.where(below, m1, m3)
            high = tl.where(enough, tl.minimum(middle, high), high)
            low = tl.where(enough, low, tl.minimum(middle + 1, high))
        return low

    @triton.jit
    def _nucleus(values, count, level, peak, whole, p, ASIDE: tl.constexpr):
        """_threshold of top-p among what was set aside, which begins at `level`."""
        n = tl.arange(0, ASIDE)
        x = tl.load(values + n, mask=n < count, other=float("-inf"))
        order, weight = _ordered(x), tl.where(n < count, tl.exp(x - peak) / whole, 0.0)
        low, high = level, _ordered(peak)
        while low < high:
            middle = (low + high) >> 1
            enough = tl.sum(tl.where(order > middle, weight, 0.0), axis=0) < p
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        return low

    @triton.jit
    def _noisiest_aside(values, ids, count, vocab, kept, seed, position, ASIDE: tl.constexpr):
        """_noisiest among what was set aside."""
        n = tl.arange(0, ASIDE)
        x = tl.load(values + n, mask=n < count, other=float("-inf"))
        index = tl.load(ids + n, mask=n < count, other=0)
        score = tl.where((n < count) & (_ordered(x) >= kept), x + _gumbel(seed, position, index), float("-inf"))
        return tl.min(tl.where(score == tl.max(score, axis=0), index, vocab), axis=0)

    @triton.jit
    def _noisiest(at, temperature, vocab, kept, seed, position, TILE: tl.constexpr):
        """The token with the largest sum of logit and noise among those from `kept` up."""
        high, first = tl.full([TILE], float("-inf"), tl.float32), tl.full([TILE], 0, tl.int32)
        for begin in range(0, vocab, TILE):
            index = begin + tl.arange(0, TILE)
            x = tl.load(at + index, mask=index < vocab, other=float("-inf")).to(tl.float32) / temperature
            score = tl.where((index < vocab) & (_ordered(x) >= kept), x + _gumbel(seed, position, index),
                             float("-inf"))  # fmt: skip
            first = tl.where(score > high, index, first)
            high = tl.maximum(high, tl.where(score == score, score, float("-inf")))
        top = tl.max(high, axis=0)
        return tl.min(tl.where(high == top, first, vocab), axis=0)

    @triton.jit
    def _pick(
        logits, positions, temperatures, top_ks, top_ps, min_ps, seeds, picked, best, values, ids, row_stride,
        node_stride, vocab,
        NODES: tl.constexpr, FILTERED: tl.constexpr, TILE: tl.constexpr, ASIDE: tl.constexpr,
    ):  # fmt: skip
        here = tl.program_id(0)
        row, node = here // NODES, here % NODES
        at = logits + row.to(tl.int64) * row_stride + node.to(tl.int64) * node_stride
        high, first = tl.full([TILE], float("-inf"), tl.float32), tl.full([TILE], 0, tl.int32)
        bad = tl.zeros([TILE], tl.int32)
        for begin in range(0, vocab, TILE):
            index = begin + tl.arange(0, TILE)
            x = tl.load(at + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
            bad = bad | (x != x).to(tl.int32)
            first = tl.where(x > high, index, first)
            high = tl.maximum(high, tl.where(x == x, x, float("-inf")))
        largest = tl.max(high, axis=0)
        token = tl.min(tl.where(high == largest, first, vocab), axis=0)
        tl.store(best + here, tl.where(tl.max(bad, axis=0) > 0, float("nan"), largest))
        temperature = tl.load(temperatures + row)
        if temperature > 0:
            kept = row.to(tl.int64) * 0 - 2147483648
            peak = largest / temperature
            position, seed = tl.load(positions + here), tl.load(seeds + row)
            count = row * 0 - 1  # of tokens aside; negative: none were, all are looked at
            if FILTERED:
                k, p = tl.load(top_ks + row), tl.load(top_ps + row)
                if (k > 0) & (k < vocab):
                    kept = _threshold(at, temperature, vocab, kept, peak, 1.0, k.to(tl.float32), False, TILE)
                if p < 1.0:
                    mass = tl.zeros([TILE], tl.float32)
                    for begin in range(0, vocab, TILE):
                        index = begin + tl.arange(0, TILE)
                        x = tl.load(at + index, mask=index < vocab, other=float("-inf")).to(tl.float32) / temperature
                        mass += tl.where((index < vocab) & (_ordered(x) >= kept), tl.exp(x - peak), 0.0)
                    whole = tl.sum(mass, axis=0)
                    # all that lie lower weigh less than half of 1 - p together
                    level = tl.maximum(kept, _ordered(peak + tl.log(0.5 * (1.0 - p) * whole / vocab)))
                    count = row * 0
                    for begin in range(0, vocab, TILE):
                        index = begin + tl.arange(0, TILE)
                        x = tl.load(at + index, mask=index < vocab, other=float("-inf")).to(tl.float32) / temperature
                        there = ((index < vocab) & (_ordered(x) >= level)).to(tl.int32)
                        to = here * ASIDE + count + tl.cumsum(there, axis=0) - 1
                        fits = (there > 0) & (to < (here + 1) * ASIDE)
                        tl.store(values + to, x, mask=fits)
                        tl.store(ids + to, index, mask=fits)
                        count += tl.sum(there, axis=0)
                    tl.debug_barrier()  # other threads of this program read what was written
                    if count <= ASIDE:
                        nucleus = _nucleus(values + here * ASIDE, count, level, peak, whole, p, ASIDE)
                    else:
                        count = row * 0 - 1
                        nucleus = _threshold(at, temperature, vocab, kept, peak, whole, p, True, TILE)
                    kept = tl.maximum(kept, nucleus)
                floor = tl.load(min_ps + row)
                if floor > 0:
                    kept = tl.maximum(kept, _ordered(peak + tl.log(floor)))
                if count >= 0:
                    token = _noisiest_aside(
                        values + here * ASIDE, ids + here * ASIDE, count, vocab, kept, seed, position, ASIDE
                    )
                else:
                    token = _noisiest(at, temperature, vocab, kept, seed, position, TILE)
            else:
                token = _noisiest(at, temperature, vocab, kept, seed, position, TILE)
        tl.store(picked + here, tl.minimum(token, vocab - 1).to(tl.int64))
