"""Each node's own choice of the next token as one Triton kernel, a program for each node: filters.pick for all nodes of
a step at once. What a node picks depends on its logits and its position alone, so the walk need not be waited for.

Thresholds of top-k and top-p are found by bisection over the ordered bit patterns of float32, two bits a pass, as
filters._search does; the logits of a node lie in the cache by then.
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


def pick_nodes(logits: Tensor, sampling: Sampling, position: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, N, V) · position (B, N): of the token that is picked → token (B, N) int64, the largest logit (B, N)
    float32, NaN where there is one"""
    rows, nodes, vocab = logits.shape
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    picked = torch.empty(rows, nodes, dtype=torch.int64, device=logits.device)
    best = torch.empty(rows, nodes, dtype=torch.float32, device=logits.device)
    _pick[(rows * nodes,)](
        logits, position.contiguous(), sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p,
        sampling.seed, picked, best, logits.stride(0), logits.stride(1), vocab,
        NODES=nodes, FILTERED=sampling.filtered, TILE=TILE, num_warps=16,
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
    def _pick(
        logits, positions, temperatures, top_ks, top_ps, min_ps, seeds, picked, best, row_stride, node_stride, vocab,
        NODES: tl.constexpr, FILTERED: tl.constexpr, TILE: tl.constexpr,
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
                    nucleus = _threshold(at, temperature, vocab, kept, peak, whole, p, True, TILE)
                    kept = tl.maximum(kept, nucleus)
                floor = tl.load(min_ps + row)
                if floor > 0:
                    kept = tl.maximum(kept, _ordered(peak + tl.log(floor)))
            position, seed = tl.load(positions + here), tl.load(seeds + row)
            high, first = tl.full([TILE], float("-inf"), tl.float32), tl.full([TILE], 0, tl.int32)
            for begin in range(0, vocab, TILE):
                index = begin + tl.arange(0, TILE)
                x = tl.load(at + index, mask=index < vocab, other=float("-inf")).to(tl.float32) / temperature
                score = tl.where((index < vocab) & (_ordered(x) >= kept), x + _gumbel(seed, position, index),
                                 float("-inf"))  # fmt: skip
                first = tl.where(score > high, index, first)
                high = tl.maximum(high, tl.where(score == score, score, float("-inf")))
            top = tl.max(high, axis=0)
            token = tl.min(tl.where(high == top, first, vocab), axis=0)
        tl.store(picked + here, tl.minimum(token, vocab - 1).to(tl.int64))
