"""Each node's own choice of the next token as one Triton kernel, a program for each node: filters.pick for all nodes of
a step at once. What a node picks depends on its logits and its position alone, so the walk need not be waited for.

Top-p in two passes over the logits behind the one that finds the largest: how much the tokens weigh that lie within a
few distances of it, then those within the nearest distance that is enough are set aside, usually some dozens, and what
is left to do sees no others. Where too many would be aside, and for top-k, the threshold is found by bisection over the
ordered bit patterns of float32, as filters._search does, two bits a pass over all logits.
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

TILE = 4096  # logits at once: as many loads are under way together
WARPS = 8  # of a program
ASIDE = 4096  # tokens that may be set aside for top-p
FEW = 256  # of them, compared with one another


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
        NODES=nodes, FILTERED=sampling.filtered, TILE=TILE, ASIDE=aside, FEW=FEW, num_warps=WARPS,
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
    def _number(order):
        """The float32 of such a pattern."""
        bits = order.to(tl.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    @triton.jit
    def _scaled(at, index, vocab, temperature):
        return tl.load(at + index, mask=index < vocab, other=float("-inf")).to(tl.float32) / temperature

    @triton.jit
    def _heavier(at, temperature, vocab, kept, peak, whole, m1, m2, m3, MASS: tl.constexpr, TILE: tl.constexpr):
        """How much lies strictly above three patterns: tokens (MASS false), or the share of those from `kept` up."""
        s1, s2, s3 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        for begin in range(0, vocab, TILE):
            index = begin + tl.arange(0, TILE)
            x = _scaled(at, index, vocab, temperature)
            order = _ordered(x)
            weight = (index < vocab).to(tl.float32)
            if MASS:
                weight = tl.where((index < vocab) & (x >= kept), tl.exp(x - peak) / whole, 0.0)
            s1 += tl.where(order > m1, weight, 0.0)
            s2 += tl.where(order > m2, weight, 0.0)
            s3 += tl.where(order > m3, weight, 0.0)
        return tl.sum(s1, axis=0), tl.sum(s2, axis=0), tl.sum(s3, axis=0)

    @triton.jit
    def _threshold(at, temperature, vocab, kept, peak, whole, target, MASS: tl.constexpr, TILE: tl.constexpr):
        """The smallest number such that what lies strictly above it weighs less than `target`."""
        low, high = _ordered(peak) * 0 - 2147483648, _ordered(peak) * 0 + 2147483647
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
        return _number(low)

    @triton.jit
    def _level(at, temperature, vocab, kept, peak, p, TILE: tl.constexpr):
        """The sum of all weights exp(x - peak) from `kept` up, and a number that top-p's threshold is not below."""
        whole, within_2 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        within_4, within_6 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        within_8 = tl.zeros([TILE], tl.float32)
        for begin in range(0, vocab, TILE):
            index = begin + tl.arange(0, TILE)
            x = _scaled(at, index, vocab, temperature)
            weight = tl.where((index < vocab) & (x >= kept), tl.exp(x - peak), 0.0)
            whole += weight
            within_2 += tl.where(x >= peak - 2.0, weight, 0.0)
            within_4 += tl.where(x >= peak - 4.0, weight, 0.0)
            within_6 += tl.where(x >= peak - 6.0, weight, 0.0)
            within_8 += tl.where(x >= peak - 8.0, weight, 0.0)
        total = tl.sum(whole, axis=0)
        enough = (p + 1e-4) * total  # sums in another order must not disagree
        level = peak + tl.log(0.5 * (1.0 - p) * total / vocab)  # all below weigh less than half of 1 - p together
        level = tl.where(tl.sum(within_8, axis=0) >= enough, tl.maximum(level, peak - 8.0), level)
        level = tl.where(tl.sum(within_6, axis=0) >= enough, peak - 6.0, level)
        level = tl.where(tl.sum(within_4, axis=0) >= enough, peak - 4.0, level)
        level = tl.where(tl.sum(within_2, axis=0) >= enough, peak - 2.0, level)
        return total, tl.maximum(level, kept)

    @triton.jit
    def _set_aside(at, temperature, vocab, level, values, ids, SIZE: tl.constexpr, TILE: tl.constexpr):
        """The tokens from `level` up, in their order, as far as there is room; → how many there are."""
        count = vocab * 0
        for begin in range(0, vocab, TILE):
            index = begin + tl.arange(0, TILE)
            x = _scaled(at, index, vocab, temperature)
            there = ((index < vocab) & (x >= level)).to(tl.int32)
            found = tl.sum(there, axis=0)
            if found > 0:
                to = count + tl.cumsum(there, axis=0) - 1
                fits = (there > 0) & (to < SIZE)
                tl.store(values + to, x, mask=fits)
                tl.store(ids + to, index, mask=fits)
                count += found
        tl.debug_barrier()  # other threads of this program read what was written
        return count

    @triton.jit
    def _nucleus(values, count, peak, whole, p, FEW: tl.constexpr):
        """_threshold of top-p among the few that were set aside: the smallest of those that less than p lies above."""
        n = tl.arange(0, FEW)
        x = tl.load(values + n, mask=n < count, other=float("-inf"))
        above = tl.zeros([FEW], tl.float32)
        for begin in range(0, count, 16):
            m = begin + tl.arange(0, 16)
            other = tl.load(values + m, mask=m < count, other=float("-inf"))
            weight = tl.where(m < count, tl.exp(other - peak) / whole, 0.0)
            above += tl.sum(tl.where(other[None, :] > x[:, None], weight[None, :], 0.0), axis=1)
        return tl.min(tl.where((n < count) & (above < p), x, float("inf")), axis=0)

    @triton.jit
    def _nucleus_of_many(values, count, level, peak, whole, p, ASIDE: tl.constexpr):
        """The same by bisection, from `level` on."""
        n = tl.arange(0, ASIDE)
        x = tl.load(values + n, mask=n < count, other=float("-inf"))
        order, weight = _ordered(x), tl.where(n < count, tl.exp(x - peak) / whole, 0.0)
        low, high = _ordered(level), _ordered(peak)
        while low < high:
            middle = (low + high) >> 1
            enough = tl.sum(tl.where(order > middle, weight, 0.0), axis=0) < p
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        return _number(low)

    @triton.jit
    def _noisiest_aside(values, ids, count, vocab, kept, seed, position, SIZE: tl.constexpr):
        """_noisiest among the first SIZE of what was set aside."""
        n = tl.arange(0, SIZE)
        x = tl.load(values + n, mask=n < count, other=float("-inf"))
        index = tl.load(ids + n, mask=n < count, other=0)
        score = tl.where((n < count) & (x >= kept), x + _gumbel(seed, position, index), float("-inf"))
        return tl.min(tl.where(score == tl.max(score, axis=0), index, vocab), axis=0)

    @triton.jit
    def _noisiest(at, temperature, vocab, kept, seed, position, TILE: tl.constexpr):
        """The token with the largest sum of logit and noise among those from `kept` up."""
        high, first = tl.full([TILE], float("-inf"), tl.float32), tl.full([TILE], 0, tl.int32)
        for begin in range(0, vocab, TILE):
            index = begin + tl.arange(0, TILE)
            x = _scaled(at, index, vocab, temperature)
            score = tl.where((index < vocab) & (x >= kept), x + _gumbel(seed, position, index), float("-inf"))
            first = tl.where(score > high, index, first)
            high = tl.maximum(high, tl.where(score == score, score, float("-inf")))
        top = tl.max(high, axis=0)
        return tl.min(tl.where(high == top, first, vocab), axis=0)

    @triton.jit
    def _pick(
        logits, positions, temperatures, top_ks, top_ps, min_ps, seeds, picked, best, values, ids, row_stride,
        node_stride, vocab,
        NODES: tl.constexpr, FILTERED: tl.constexpr, TILE: tl.constexpr, ASIDE: tl.constexpr, FEW: tl.constexpr,
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
            peak = largest / temperature
            kept = peak * 0.0 + float("-inf")
            position, seed = tl.load(positions + here), tl.load(seeds + row)
            mine, my_ids = values + here * ASIDE, ids + here * ASIDE
            count = vocab * 0 - 1  # of tokens aside; negative: none were, all are looked at
            if FILTERED:
                k, p, floor = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
                if (k > 0) & (k < vocab):
                    kept = _threshold(at, temperature, vocab, kept, peak, 1.0, k.to(tl.float32), False, TILE)
                if p < 1.0:
                    whole, level = _level(at, temperature, vocab, kept, peak, p, TILE)
                    count = _set_aside(at, temperature, vocab, level, mine, my_ids, ASIDE, TILE)
                    if count <= FEW:
                        nucleus = _nucleus(mine, count, peak, whole, p, FEW)
                    elif count <= ASIDE:
                        nucleus = _nucleus_of_many(mine, count, level, peak, whole, p, ASIDE)
                    else:
                        count = vocab * 0 - 1
                        nucleus = _threshold(at, temperature, vocab, kept, peak, whole, p, True, TILE)
                    kept = tl.maximum(kept, nucleus)
                if floor > 0:
                    kept = tl.maximum(kept, peak + tl.log(floor))
            if count < 0:
                token = _noisiest(at, temperature, vocab, kept, seed, position, TILE)
            elif count <= FEW:
                token = _noisiest_aside(mine, my_ids, count, vocab, kept, seed, position, FEW)
            else:
                token = _noisiest_aside(mine, my_ids, count, vocab, kept, seed, position, ASIDE)
        tl.store(picked + here, tl.minimum(token, vocab - 1).to(tl.int64))
