"""The two inner loops of the tree search as Triton kernels: the best R of a vocabulary, and the best W of W·R children.

torch.topk takes 50 to 100 µs for a row of logits and a log-softmax several passes over it; a search of seven depths
would cost more than half a step of a small model. Here each tile of the vocabulary gives its own best R and its part
of the softmax's sum, and a second, small kernel joins the tiles (the two-pass top-k of Triton's and FlashInfer's
samplers). Same results as drafting/pool.py's, up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..drafting.pool import Children
from ..drafting.tree import HeadNodes
from ..sampling.filters import Sampling

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch has no Triton; kernels.choose then takes torch
    triton = None

TILE = 1024  # tokens of one program


def top_children(
    logits: Tensor,
    depth: int | None,
    length: Tensor,
    tau: Tensor,
    token_map: Tensor | None,
    sampling: Sampling,
    num_ranks: int,
) -> Children:
    """As drafting/pool.py's."""
    rows, places, vocab = logits.shape
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    tiles, programs = triton.cdiv(vocab, TILE), rows * places
    device = logits.device
    scores = torch.empty(programs, tiles, num_ranks, dtype=torch.float32, device=device)
    ids = torch.empty(programs, tiles, num_ranks, dtype=torch.int32, device=device)
    shares = torch.empty(2, programs, tiles, dtype=torch.float32, device=device)  # each tile's peak, and its sum
    tokens = torch.empty(rows, places, num_ranks, dtype=torch.int64, device=device)
    logp = torch.empty(rows, places, num_ranks, dtype=torch.float32, device=device)
    base_ids = tokens if token_map is None else token_map
    _tile_best[(programs, tiles)](
        logits, scores, ids, shares[0], shares[1], tau, length, sampling.temperature, sampling.seed, base_ids,
        logits.stride(0), logits.stride(1), vocab, places, depth or 0,
        DEPTHS=tau.shape[1], BY_PLACE=depth is None, SAMPLED=sampling.sampled,
        MAPPED=token_map is not None, RANKS=num_ranks, TILE=TILE, num_warps=4,
    )  # fmt: skip
    _join_tiles[(programs,)](
        scores, ids, shares[0], shares[1], base_ids, tokens, logp,
        MAPPED=token_map is not None, TILES=tiles, RANKS=num_ranks, TILE_BLOCK=triton.next_power_of_2(tiles),
        BLOCK=triton.next_power_of_2(tiles * num_ranks), num_warps=4,
    )  # fmt: skip
    return Children(tokens, logp)


class FusedPool:
    """drafting.pool.Pool with one kernel for each depth."""

    def __init__(self, rows: int, size: int, device: torch.device) -> None:
        self.tokens, self.parents, self.depths = (
            torch.empty(rows, size, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.scores = torch.empty(rows, size, dtype=torch.float32, device=device)
        self._beams = torch.zeros(rows, 1, dtype=torch.float32, device=device)
        self._above = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._filled = self._depth = 0

    def grow(self, tokens: Tensor, logp: Tensor, width: int) -> tuple[Tensor, Tensor]:
        rows, beams = self._beams.shape
        ranks, device = tokens.shape[2], tokens.device
        scores = torch.empty(rows, width, dtype=torch.float32, device=device)
        above, beam, chosen = (torch.empty(rows, width, dtype=torch.int64, device=device) for _ in range(3))
        self._depth += 1
        _grow[(rows,)](
            self._beams, self._above, tokens, logp, self.tokens, self.parents, self.depths, self.scores,
            scores, above, beam, chosen,
            tokens.stride(0), logp.stride(0), self._filled, self.tokens.shape[1], self._depth,
            BEAMS=beams, RANKS=ranks, SHARED=tokens.shape[1] == 1 and beams > 1, WIDTH=width,
            BLOCK=triton.next_power_of_2(beams * ranks), num_warps=1 if beams * ranks <= 128 else 4,
        )  # fmt: skip
        self._beams, self._above, self._filled = scores, above, self._filled + beams * ranks
        return beam, chosen

    def best(self, max_nodes: int) -> HeadNodes:
        """As in drafting.pool.Pool.best."""
        rows, size = self.scores.shape
        places = torch.empty(rows, size, dtype=torch.int32, device=self.scores.device)
        nodes = torch.empty(3, rows, max_nodes, dtype=torch.int64, device=self.scores.device)
        _best[(rows,)](
            self.tokens, self.parents, self.depths, self.scores, places, nodes[0], nodes[1], nodes[2], size,
            COUNT=max_nodes, BLOCK=triton.next_power_of_2(size), CHUNK=16, num_warps=4,
        )  # fmt: skip
        return HeadNodes(*nodes)


if triton is not None:
    from .noise import _gumbel

    NEVER = tl.constexpr(-1e9)  # as in drafting/pool.py
    STEP_COST = tl.constexpr(1e-4)

    @triton.jit(do_not_specialize=["places", "depth"])  # else each value would compile a variant, in seconds
    def _tile_best(
        logits, scores, ids, peaks, sums, tau, lengths, temperatures, seeds, base_ids,
        row_stride, place_stride, vocab, places, depth,
        DEPTHS: tl.constexpr, BY_PLACE: tl.constexpr, SAMPLED: tl.constexpr,
        MAPPED: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """One tile of one place: its best RANKS, its peak, and Σ exp(score - peak)."""
        at, tile = tl.program_id(0), tl.program_id(1)
        row, place = at // places, at % places
        if BY_PLACE:
            depth = place
        index = tile * TILE + tl.arange(0, TILE)
        inside = index < vocab
        x = tl.load(logits + row * row_stride + place * place_stride + index, mask=inside, other=float("-inf"))
        x = x.to(tl.float32)
        sharpness = tl.load(tau + depth)
        if SAMPLED:
            temperature = tl.load(temperatures + row)
            if temperature > 0:
                token = index
                if MAPPED:
                    token = tl.load(base_ids + index, mask=inside, other=0).to(tl.int32)
                position = tl.load(lengths + row) + 1 + depth
                x = x / temperature + _gumbel(tl.load(seeds + row), position, token)
                sharpness = tl.load(tau + DEPTHS + depth)
        x = tl.where(inside & (x == x), x / sharpness, float("-inf"))
        peak = tl.max(x, axis=0)
        line = at * tl.num_programs(1) + tile
        tl.store(peaks + line, peak)
        tl.store(sums + line, tl.sum(tl.exp(x - tl.where(peak == float("-inf"), 0.0, peak)), axis=0))
        for rank in tl.static_range(RANKS):
            best, where = tl.max(x, axis=0, return_indices=True)
            tl.store(scores + line * RANKS + rank, best)
            tl.store(ids + line * RANKS + rank, tl.minimum(tile * TILE + where, vocab - 1))
            x = tl.where(index == tile * TILE + where, float("-inf"), x)

    @triton.jit
    def _join_tiles(
        scores, ids, peaks, sums, base_ids, tokens, logp,
        MAPPED: tl.constexpr, TILES: tl.constexpr, RANKS: tl.constexpr, TILE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The best RANKS of a place out of its tiles' best, and their log-probabilities."""
        at = tl.program_id(0)
        tile, index = tl.arange(0, TILE_BLOCK), tl.arange(0, BLOCK)
        peak = tl.load(peaks + at * TILES + tile, mask=tile < TILES, other=float("-inf"))
        mass = tl.load(sums + at * TILES + tile, mask=tile < TILES, other=0.0)
        top = tl.max(peak, axis=0)
        total = top + tl.log(tl.sum(mass * tl.exp(peak - tl.where(top == float("-inf"), 0.0, top)), axis=0))
        x = tl.load(scores + at * TILES * RANKS + index, mask=index < TILES * RANKS, other=float("-inf"))
        for rank in tl.static_range(RANKS):
            best, where = tl.max(x, axis=0, return_indices=True)
            token = tl.load(ids + at * TILES * RANKS + where).to(tl.int64)
            if MAPPED:
                token = tl.load(base_ids + token)
            tl.store(tokens + at * RANKS + rank, token)
            tl.store(logp + at * RANKS + rank, best - total)
            x = tl.where(index == where, float("-inf"), x)

    @triton.jit(do_not_specialize=["filled", "pool_size", "depth"])
    def _grow(
        beams, above, tokens, logp, pool_tokens, pool_parents, pool_depths, pool_scores,
        next_beams, next_above, next_beam, next_token, tokens_stride, logp_stride, filled, pool_size, depth,
        BEAMS: tl.constexpr, RANKS: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Add a row's new children to its pool; the best WIDTH of them become its beams. A row's tokens and logp are
        contiguous; rows have a stride."""
        row, index = tl.program_id(0), tl.arange(0, BLOCK)
        beam, inside = index // RANKS, index < BEAMS * RANKS
        child = index % RANKS if SHARED else index
        tokens += row * tokens_stride
        parent = tl.load(beams + row * BEAMS + beam, mask=inside, other=0.0)
        p = tl.load(logp + row * logp_stride + child, mask=inside, other=0.0)
        p = tl.maximum(tl.where(p == p, p, NEVER), NEVER)
        score = tl.minimum(parent + p, parent * (1 + 1e-6) - STEP_COST)
        to = row * pool_size + filled + index
        tl.store(pool_tokens + to, tl.load(tokens + child, mask=inside, other=0), mask=inside)
        tl.store(pool_parents + to, tl.load(above + row * BEAMS + beam, mask=inside, other=0), mask=inside)
        tl.store(pool_depths + to, tl.zeros([BLOCK], tl.int64) + depth, mask=inside)
        tl.store(pool_scores + to, score, mask=inside)
        score = tl.where(inside, score, float("-inf"))
        for i in tl.static_range(WIDTH):
            best, where = tl.max(score, axis=0, return_indices=True)
            tl.store(next_beams + row * WIDTH + i, best)
            tl.store(next_above + row * WIDTH + i, (filled + where + 1).to(tl.int64))
            tl.store(next_beam + row * WIDTH + i, (where // RANKS).to(tl.int64))
            tl.store(next_token + row * WIDTH + i, tl.load(tokens + (where % RANKS if SHARED else where)))
            score = tl.where(index == where, float("-inf"), score)

    @triton.jit(do_not_specialize=["size"])
    def _best(
        pool_tokens, pool_parents, pool_depths, pool_scores, places, tokens, parents, depths, size,
        COUNT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """A row's best COUNT nodes in order: a node's place is the number of better nodes."""
        row, n = tl.program_id(0), tl.arange(0, BLOCK)
        inside, at = n < size, row * size + n
        score = tl.load(pool_scores + at, mask=inside, other=float("-inf"))
        place = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, size, CHUNK):
            m = begin + tl.arange(0, CHUNK)
            other = tl.load(pool_scores + row * size + m, mask=m < size, other=float("-inf"))[None, :]
            equal = (other == score[:, None]) & (m[None, :] < n[:, None])
            place += tl.sum((((other > score[:, None]) | equal) & (m < size)[None, :]).to(tl.int32), axis=1)
        tl.store(places + at, place, mask=inside)
        tl.debug_barrier()  # other threads of this program read what was written
        chosen = inside & (place < COUNT)
        parent = tl.load(pool_parents + at, mask=chosen, other=0)
        above = tl.load(places + row * size + parent - 1, mask=chosen & (parent > 0), other=-1) + 1
        to = row * COUNT + place
        tl.store(tokens + to, tl.load(pool_tokens + at, mask=chosen, other=0), mask=chosen)
        tl.store(parents + to, above.to(tl.int64), mask=chosen)
        tl.store(depths + to, tl.load(pool_depths + at, mask=chosen, other=0), mask=chosen)
