"""The two products of attention on a CPU, in LLVM's vectors: queries by keys, and weights by values.

Up to four queries read a key or a value together. A query's sums are the same bits for any number of queries: fused
multiply-adds and one tree of sums add up the elements of a head, and keys are added one after the other. Only full
blocks of 16 elements are computed here; the caller computes the elements after the last one.

Queries and sums are float32. Their elements are reordered: even ones of a block come first (`Vectors.two_wide`).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from .base import OPTIONS, intrinsic
from .vectors import F32, I32, LANES, Vectors, same

BLOCK = 2 * LANES  # elements of a head that are read at once
QUERIES = 4
AHEAD = 16  # keys to prefetch ahead: a head's rows are not adjacent, which the hardware's prefetcher handles badly


def _kernel(kind: Any, queries: int) -> Any:
    @intrinsic
    def run(_, a, a_row, b, b_row, first, count, blocks, out, out_row, soon):
        """soon: address of the rows that are read next, with b's strides; they are prefetched"""

        def generate(context, builder, signature, arguments):
            kind(builder, queries, *arguments).make()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return run


class _Kernel(Vectors):
    def __init__(
        self, builder: Any, queries: int, a, a_row, b, b_row, first, count, blocks, out, out_row, soon
    ) -> None:
        super().__init__(builder)
        self.queries = range(queries)
        self.a, self.a_row, self.b_at, self.b_row = a, a_row, b, b_row
        self.first, self.count, self.blocks = first, count, blocks
        self.out, self.out_row, self.soon = out, out_row, soon

    def block(self, address: Any, row: Any, size: Any, block: Any, bytes_of_block: int) -> Any:
        """Address of a row's block. size: bytes of a row"""
        return self.at(self.at(address, row, size), block, self.word(bytes_of_block))


class _Scores(_Kernel):
    """out[i, t] = a[i] · b[t], for first ≤ t < count. Row strides are in bytes."""

    def make(self) -> None:
        b, two = self.b, self.word(2)
        number = b.sub(self.count, self.first)
        with cgutils.for_range(b, b.sdiv(number, two)) as loop:
            self.keys(b.add(self.first, b.mul(loop.index, two)), 2)
        with b.if_then(b.icmp_signed("!=", b.and_(number, self.word(1)), self.word(0))):
            self.keys(b.sub(self.count, self.word(1)), 1)

    def keys(self, first: Any, number: int) -> None:
        b, zero = self.b, same(self.floats, 0.0)
        sums = [self.variables(len(self.queries), zero) for _ in range(number)]
        with cgutils.for_range(b, self.blocks) as loop:
            keys = [
                self.two_wide(self.block(self.b_at, b.add(first, self.word(k)), self.b_row, loop.index, 2 * BLOCK))
                for k in range(number)
            ]
            for k in range(number):
                ahead = b.add(first, self.word(k + AHEAD))
                self.ask_for(self.block(self.b_at, ahead, self.b_row, loop.index, 2 * BLOCK))
                self.ask_for(self.block(self.soon, b.add(first, self.word(k)), self.b_row, loop.index, 2 * BLOCK))
            for i in self.queries:
                query = self.block(self.a, self.word(i), self.a_row, loop.index, 4 * BLOCK)
                for part in (0, 1):
                    places = self.load(self.at(query, part, self.word(4 * LANES)), self.floats, 4)
                    for k in range(number):
                        b.store(self.fma(places, keys[k][part], b.load(sums[k][i])), sums[k][i])
        for k, each in enumerate(sums):
            across = self.across([b.load(total) for total in each])
            for i in self.queries:
                place = self.at(self.at(self.out, i, self.out_row), b.add(first, self.word(k)), self.word(4))
                self.store(place, b.extract_element(across, ir.Constant(I32, i)))

    def across(self, vectors: list[Any]) -> Any:
        """The sum of each vector's numbers (four vectors at most), always by the same tree."""
        vectors = (vectors + [vectors[-1]] * QUERIES)[:QUERIES]
        for width in (4, 2, 1):
            halves = [
                [place + part for place in range(0, 2 * LANES, 2 * width) for part in range(side, side + width)]
                for side in (0, width)
            ]
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if len(vectors) > 1 else [(vectors[0],) * 2]
            vectors = [self.b.fadd(*(self.shuffled(*pair, half) for half in halves)) for pair in pairs]
        return vectors[0]


class _Weighed(_Kernel):
    """out[i] += a[i, t] · b[t], for first ≤ t < count one after the other. Row strides are in bytes."""

    def make(self) -> None:
        b = self.b
        with cgutils.for_range(b, self.blocks) as block:
            places = [
                self.at(self.block(self.out, self.word(i), self.out_row, block.index, 4 * BLOCK), 4 * LANES * part)
                for i in self.queries
                for part in (0, 1)
            ]
            sums = self.variables(len(places), same(self.floats, 0.0))
            for place, total in zip(places, sums, strict=True):
                b.store(self.load(place, self.floats, 4), total)
            with cgutils.for_range(b, b.sub(self.count, self.first)) as loop:
                t = b.add(self.first, loop.index)
                self.ask_for(self.block(self.soon, t, self.b_row, block.index, 2 * BLOCK))
                value = self.two_wide(self.block(self.b_at, t, self.b_row, block.index, 2 * BLOCK))
                for i in self.queries:
                    weight = self.spread(self.at(self.at(self.a, i, self.a_row), t, self.word(4)), F32, self.floats)
                    for part in (0, 1):
                        total = sums[2 * i + part]
                        b.store(self.fma(weight, value[part], b.load(total)), total)
            for place, total in zip(places, sums, strict=True):
                self.store(place, b.load(total))


def _for_any(kind: Any) -> Any:
    one, two, three, four = (_kernel(kind, queries) for queries in range(1, QUERIES + 1))

    @njit(inline="never", **OPTIONS)
    def run(queries, a, a_row, b, b_row, first, count, blocks, out, out_row, soon):
        if queries == 4:
            four(a, a_row, b, b_row, first, count, blocks, out, out_row, soon)
        elif queries == 3:
            three(a, a_row, b, b_row, first, count, blocks, out, out_row, soon)
        elif queries == 2:
            two(a, a_row, b, b_row, first, count, blocks, out, out_row, soon)
        else:
            one(a, a_row, b, b_row, first, count, blocks, out, out_row, soon)

    return run


scores_of, weigh = _for_any(_Scores), _for_any(_Weighed)
