"""Picks each node's next token in one Triton kernel, a program for each node: filters.pick for all nodes of a step at
once. A node's pick depends only on its logits and its position, so it need not wait for the walk.

A lane is every TILE-th token. One pass over the logits finds each lane's largest logit, and the sum of all weights. The
lanes' largest logits bound which tokens top-k and top-p can keep, usually some dozens. These are set aside, and the
rest of the work reads only them, unless they are too many. It searches no threshold: the token with the largest sum of
logit and noise is picked if no more than allowed lies above its logit. Else top-k and top-p keep neither it nor the
tokens below it, and the next try is among those above it. For top-p that takes 1 / top_p tries at most, on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sampling.filters import Sampling

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch has no Triton; kernels.choose then takes torch
    triton = None

TILE = 2048  # logits at once: their loads are under way together
FEW = 512  # candidates that one tile reads, of those set aside
WARPS = 8  # of a program
ASIDE = 4096  # tokens that may be set aside for top-k and top-p


def pick_nodes(logits: Tensor, sampling: Sampling, position: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, N, V) · position (B, N): of the token that is picked → token (B, N) int64, the largest logit (B, N)
    float32, NaN where a logit is NaN"""
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
        sampling.seed, picked, best, values, ids, logits.stride(0), logits.stride(1), vocab, nodes,
        FILTERED=sampling.filtered, TILE=TILE, FEW=FEW, ASIDE=aside, num_warps=WARPS,
    )  # fmt: skip
    return picked, best


if triton is not None:
    from .noise import _gumbel

    @triton.jit
    def _scaled(at, n, count, temperature):
        """Logits n of `count` over temperature."""
        return tl.load(at + n, mask=n < count, other=float("-inf")).to(tl.float32) / temperature

    @triton.jit
    def _above(at, count, temperature, kept, bound, by_mass, peak, TILE: tl.constexpr):
        """The sum over tokens above `bound` and not below `kept`: each counts 1, or (by_mass) its exp(x - peak)."""
        total = tl.zeros([TILE], tl.float32)
        for begin in range(0, count, TILE):
            x = _scaled(at, begin + tl.arange(0, TILE), count, temperature)
            total += tl.where((x > bound) & (x >= kept), tl.where(by_mass, tl.exp(x - peak), 1.0), 0.0)
        return tl.sum(total, axis=0)

    @triton.jit
    def _kth(at, count, temperature, peak, k, TILE: tl.constexpr):
        """The k-th largest, or the lowest number if there are fewer: by bisection over the bit patterns of
        float32 in the numbers' order, as filters._search does."""
        low, high = _order(peak * 0.0 + float("-inf")), _order(peak)
        while low < high:
            middle = (low + high) >> 1
            fewer = _above(at, count, temperature, float("-inf"), _number(middle), False, peak, TILE) < k
            low, high = tl.where(fewer, low, middle + 1), tl.where(fewer, middle, high)
        return _number(low)

    @triton.jit
    def _order(x):
        bits = x.to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)

    @triton.jit
    def _number(order):
        bits = order.to(tl.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    @triton.jit
    def _reach(distance, weight, enough, most):
        """A distance from the largest logit within which the lanes' largest ones weigh enough; a lane's other tokens
        only add to that. Within `most`, they or all tokens are known to weigh enough."""
        near, far = most * 0.0, most
        for _ in range(7):
            middle = 0.5 * (near + far)
            there = tl.sum(tl.where(distance <= middle, weight, 0.0), axis=0) >= enough
            near, far = tl.where(there, near, middle), tl.where(there, middle, far)
        return far

    @triton.jit
    def _set_aside(at, vocab, high, level, values, ids, SIZE: tl.constexpr, TILE: tl.constexpr):
        """The logits from `level` up and their tokens, lane by lane, if there is room; → how many there are.
        high (TILE): each lane's largest logit; a lane below `level` is not read again."""
        here = high >= level
        own = tl.zeros([TILE], tl.int32)
        for begin in range(0, vocab, TILE):
            index = begin + tl.arange(0, TILE)
            x = tl.load(at + index, mask=here & (index < vocab), other=float("-inf")).to(tl.float32)
            own += (here & (x >= level)).to(tl.int32)
        found = tl.sum(own, axis=0)
        if found <= SIZE:
            to = tl.cumsum(own, axis=0) - own
            for begin in range(0, vocab, TILE):
                index = begin + tl.arange(0, TILE)
                x = tl.load(at + index, mask=here & (index < vocab), other=float("-inf")).to(tl.float32)
                there = here & (x >= level)
                tl.store(values + to, x, mask=there)
                tl.store(ids + to, index, mask=there)
                to += there.to(tl.int32)
            tl.debug_barrier()  # other threads of this program read what was written
        return found

    @triton.jit
    def _noisiest(
        at, ids, count, vocab, temperature, kept, bound, seed, position, MAPPED: tl.constexpr, TILE: tl.constexpr
    ):
        """Of the logits over temperature from `kept` up and above `bound`: the one with the largest sum of logit and
        noise, and its token. ids: the tokens of the `count` logits if MAPPED; otherwise these are all tokens."""
        high, its = tl.full([TILE], float("-inf"), tl.float32), tl.full([TILE], float("-inf"), tl.float32)
        first = tl.zeros([TILE], tl.int32)
        for begin in range(0, count, TILE):
            index = begin + tl.arange(0, TILE)
            x = _scaled(at, index, count, temperature)
            token = tl.load(ids + index, mask=index < count, other=0) if MAPPED else index
            score = tl.where((x > bound) & (x >= kept), x + _gumbel(seed, position, token), float("-inf"))
            better = (score > high) | ((score == high) & (token < first))
            first, its = tl.where(better, token, first), tl.where(better, x, its)
            high = tl.where(better, score, high)
        best = high == tl.max(high, axis=0)
        token = tl.min(tl.where(best, first, vocab), axis=0)
        return tl.max(tl.where(best & (first == token), its, float("-inf")), axis=0), token

    @triton.jit
    def _drawn(
        at, ids, count, vocab, temperature, k, p, floor, peak, whole, seed, position,
        MAPPED: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """The token with the largest sum of logit and noise, among those that top-k, top-p and `floor` keep."""
        kept = peak * 0.0 + float("-inf")
        limited, by_mass = (k > 0) & (k < vocab), p < 1.0
        if limited & by_mass:  # top-p sees what top-k keeps
            kept = _kth(at, count, temperature, peak, k, TILE)
            whole = _above(at, count, temperature, kept, float("-inf"), True, peak, TILE)
        left = tl.where(by_mass, p * whole, tl.where(limited, k, vocab).to(tl.float32))
        kept = tl.maximum(kept, floor)
        x, token, beyond = peak * 0.0 + float("-inf"), vocab * 0, True
        while beyond:
            x, token = _noisiest(at, ids, count, vocab, temperature, kept, x, seed, position, MAPPED, TILE)
            beyond = (x < peak) & (_above(at, count, temperature, kept, x, by_mass, peak, TILE) >= left)
        return token

    @triton.jit(do_not_specialize=["nodes"])  # else each value would compile a variant
    def _pick(
        logits, positions, temperatures, top_ks, top_ps, min_ps, seeds, picked, best, values, ids, row_stride,
        node_stride, vocab, nodes,
        FILTERED: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr, ASIDE: tl.constexpr,
    ):  # fmt: skip
        here = tl.program_id(0)
        row, node = here // nodes, here % nodes
        at = logits + row.to(tl.int64) * row_stride + node.to(tl.int64) * node_stride
        temperature = tl.load(temperatures + row)
        hot = temperature > 0
        colder = 1.0 / tl.where(hot, temperature, 1.0)
        high, first = tl.full([TILE], float("-inf"), tl.float32), tl.full([TILE], 0, tl.int32)
        bad, share = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.float32)  # share: Σ exp(x - high) of a lane
        for begin in range(0, vocab, TILE):
            index = begin + tl.arange(0, TILE)
            x = tl.load(at + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
            bad = bad | (x != x).to(tl.int32)
            if FILTERED:
                fade = tl.exp(-colder * tl.abs(x - tl.where(high == float("-inf"), 0.0, high)))
                share = tl.where(x > high, share * fade + 1.0, share + fade)
            first = tl.where(x > high, index, first)
            high = tl.maximum(high, tl.where(x == x, x, float("-inf")))
        largest = tl.max(high, axis=0)
        token = tl.min(tl.where(high == largest, first, vocab), axis=0)
        tl.store(best + here, tl.where(tl.max(bad, axis=0) > 0, float("nan"), largest))
        if hot:
            position, seed = tl.load(positions + here), tl.load(seeds + row)
            lowest = largest * 0.0 + float("-inf")
            if FILTERED:
                k, p, floor = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
                limited, peak = (k > 0) & (k < vocab), largest / temperature
                floor = tl.where(floor > 0, peak + tl.log(tl.maximum(floor, 1e-38)), lowest)
                mine, my_ids = values + here * ASIDE, ids + here * ASIDE
                distance = colder * (largest - high)
                weight = tl.exp(-distance)
                whole = tl.sum(share * weight, axis=0)
                count = vocab * 0 + ASIDE + 1  # more than there is room for: all tokens are looked at
                if limited | (p < 1.0):
                    if limited:
                        weight, enough = tl.full([TILE], 1.0, tl.float32), k.to(tl.float32)
                        most = tl.max(tl.where(distance < float("inf"), distance, 0.0), axis=0)
                    else:  # tokens farther than `most` weigh less than half of 1 - p
                        enough = (p + 1e-4) * whole  # sums in another order differ
                        most = tl.maximum(tl.log(2.0 * vocab / ((1.0 - p) * whole)), 0.0)
                    level = largest - temperature * _reach(distance, weight, enough, most)
                    count = _set_aside(at, vocab, high, level, mine, my_ids, ASIDE, TILE)
                    count = tl.where(limited & (count < k), ASIDE + 1, count)
                if count <= ASIDE:
                    token = _drawn(
                        mine, my_ids, count, vocab, temperature, k, p, floor, peak, whole, seed, position, True, FEW
                    )
                else:
                    token = _drawn(
                        at, my_ids, vocab, vocab, temperature, k, p, floor, peak, whole, seed, position, False, TILE
                    )
            else:
                _, token = _noisiest(at, ids, vocab, vocab, temperature, lowest, lowest, seed, position, False, TILE)
        tl.store(picked + here, tl.minimum(token, vocab - 1).to(tl.int64))
