"""Products of a few rows with int4 and int8 weights, in LLVM's vectors: Numba's code for loops over such weights takes
three times as long.

Weights are integers, and so are the inputs: a group of 32 is 32 int16 numbers and one scale, a power of two
(int16_inputs.py). A vector holds the products of eight or sixteen output rows. They are added up as 32-bit integers,
so their order does not matter: a row's sums are the same bits for any other rows, tile size and vector length. A tile
is some rows by a unit of 16 outputs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config

from ..weights.int4 import GROUP
from .base import intrinsic
from .int16_inputs import SUMMARY
from .vectors import F32, I8, I16, I32, Vectors, same

UNIT = 16  # output rows that are stored together
HALF = UNIT // 2  # int4 steps of the first half are in the low bits of bytes
PAIR = 2  # inputs of one instruction, which adds their products
QUAD = 4  # inputs of one loop step
LINE = 64  # bytes of a cache line
WIDE = 16  # numbers of a vector of AVX-512
# LLVM's names of the instruction that multiplies int16 pairs and adds each two products, by its number of results
PAIR_PRODUCTS = {WIDE: "llvm.x86.avx512.pmaddw.d.512", WIDE // 2: "llvm.x86.avx2.pmadd.wd"}


def tiles(kind: type[Tile]) -> Any:
    """A function that computes a tile of 1 to most_rows() rows."""

    @intrinsic
    def run(_, rows, x, inputs, summaries, packed, scales, out, outputs):
        """rows: of the tile · addresses: x (M, inputs) int16 and summaries (M, groups, SUMMARY) from int16_inputs.py,
        a unit's weights and scales, out (M, outputs) bfloat16"""

        def generate(context, builder, signature, arguments):
            count, *rest = arguments
            blocks = [builder.append_basic_block(f"rows{rows}") for rows in range(1, most_rows() + 1)]
            end = builder.append_basic_block("end")
            switch = builder.switch(count, blocks[-1])
            for rows, block in enumerate(blocks, 1):
                if block is not blocks[-1]:
                    switch.add_case(ir.Constant(count.type, rows), block)
                builder.position_at_end(block)
                kind(builder, rows, *rest).make()
                builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return run


def lanes_here() -> tuple[int, bool]:
    """(numbers in a vector on this processor, whether it has an instruction for products of int16 pairs)"""
    settings: Any = config  # Numba's settings may name another processor, or forbid instructions of this one
    if settings.CPU_NAME is not None or settings.CPU_FEATURES is not None or not settings.ENABLE_AVX:
        return WIDE // 2, False
    has = binding.get_host_cpu_features()
    return (WIDE, True) if has.get("avx512bw") else (WIDE // 2, bool(has.get("avx2")))


def most_rows() -> int:
    """The most rows of a tile: with more, not all sums stay in registers."""
    return 8 if lanes_here()[0] == WIDE else 4


class Tile(Vectors):
    """Writes the instructions of a tile. Its subclasses know how weights are stored."""

    group_bytes: int  # of a unit's weights
    scale_bytes: int  # of a unit's scales

    def __init__(self, builder: Any, rows: int, x, inputs, summaries, packed, scales, out, outputs) -> None:
        lanes, known = lanes_here()
        super().__init__(builder, lanes)
        self.bytes, self.pairs, self.both = (ir.VectorType(kind, PAIR * lanes) for kind in (I8, I16, I32))
        self.rows, self.vectors = range(rows), range(UNIT // lanes)
        self.groups = builder.udiv(inputs, self.word(GROUP))
        self.x = [self.at(x, r, inputs, 2) for r in self.rows]
        self.summaries = [self.at(summaries, r, self.groups, 4 * SUMMARY) for r in self.rows]
        self.packed, self.scales = packed, scales
        self.out = [self.at(out, r, outputs, 2) for r in self.rows]
        self._pair_products = self.declared(PAIR_PRODUCTS[lanes], self.words, [self.pairs] * 2) if known else None

    def make(self) -> None:
        b = self.b
        totals = [self.variables(len(self.vectors), same(self.floats, 0.0)) for _ in self.rows]
        with cgutils.for_range(b, self.groups) as loop:
            x = [self.at(row, loop.index, self.word(2 * GROUP)) for row in self.x]
            summaries = [self.at(row, loop.index, self.word(4 * SUMMARY)) for row in self.summaries]
            packed = self.at(self.packed, loop.index, self.word(self.group_bytes))
            scales = self.at(self.scales, loop.index, self.word(self.scale_bytes))
            self.fetch(packed, self.group_bytes)
            self.fetch(scales, self.scale_bytes)
            found = self.summed_up(x, packed, self.starts(summaries))
            for r in self.rows:
                for v, total in enumerate(totals[r]):
                    value = self.scaled(b.load(total), b.sitofp(found[r][v], self.floats), summaries[r], scales, v)
                    b.store(value, total)
        for r, row in enumerate(totals):
            for v, total in enumerate(row):
                self.keep(self.at(self.out[r], 2 * self.lanes * v), b.load(total))

    def summed_up(self, x: list[Any], packed: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """Each row's sums over a group. sums: their initial values"""
        b = self.b
        for quad in range(GROUP // QUAD):
            pairs = self.steps(self.at(packed, quad, self.word(self.group_bytes * QUAD // GROUP)))
            for pair, steps in enumerate(pairs, quad * QUAD // PAIR):
                for r in self.rows:
                    numbers = self.spread(self.at(x[r], 2 * PAIR * pair), I32, self.words)
                    sums[r] = [
                        b.add(old, self.products(numbers, step)) for old, step in zip(sums[r], steps, strict=True)
                    ]
                sums = self.fenced(sums)
        return sums

    def fenced(self, sums: list[list[Any]]) -> list[list[Any]]:
        """The same sums, all used at this place: otherwise LLVM orders a group's products so that they need too many
        registers."""
        every = [each for row in sums for each in row]
        if self._pair_products is None or len(every) == 1:
            return sums
        kind = ir.FunctionType(ir.LiteralStructType([self.words] * len(every)), [self.words] * len(every))
        place = "=v" if self.lanes == WIDE else "=x"  # any register, or one of the first half
        places = ",".join([place] * len(every) + [str(n) for n in range(len(every))])
        held = self.b.asm(kind, "", places, every, True)
        found, number = [self.b.extract_value(held, n) for n in range(len(every))], len(self.vectors)
        return [found[n : n + number] for n in range(0, len(found), number)]

    def starts(self, summaries: list[Any]) -> list[list[Any]]:
        """The initial values of each row's sums over a group, by vector."""
        raise NotImplementedError

    def steps(self, packed: Any) -> list[list[Any]]:
        """The int16 weights of QUAD inputs: for each pair of inputs, the unit's vectors of outputs."""
        raise NotImplementedError

    def scaled(self, total: Any, sums: Any, summary: Any, scales: Any, v: int) -> Any:
        """One vector of a row's totals plus a group's scaled sums."""
        raise NotImplementedError

    def products(self, numbers: Any, steps: Any) -> Any:
        """int16 pairs → int32: the two products of a pair added"""
        numbers = self.b.bitcast(numbers, self.pairs)
        if self._pair_products is not None:
            return self.b.call(self._pair_products, [numbers, steps])
        every = self.b.mul(self.b.sext(numbers, self.both), self.b.sext(steps, self.both))
        even, odd = (self.shuffled(every, every, range(p, PAIR * self.lanes, PAIR)) for p in range(PAIR))
        return self.b.add(even, odd)

    def fetch(self, place: Any, size: int) -> None:
        """Prefetch the same group of the next unit: the hardware's own prefetching is too slow for it."""
        ahead = self.at(place, self.groups, self.word(size))
        for line in range(0, size, LINE):
            self.ask_for(self.at(ahead, line))


class Int4Tile(Tile):
    """A unit's weights (inputs / 4, 8, 2, 2) uint8 in NativeInt4Linear.arranged's order, scales (groups, 2, 16)
    bfloat16: totals are sums of scale · Σ (step - 8) · x + zero · Σ x over a group"""

    group_bytes, scale_bytes = GROUP * UNIT // 2, 4 * UNIT

    def starts(self, summaries: list[Any]) -> list[list[Any]]:
        eight = [self.spread(self.at(summary, 8), I32, self.words) for summary in summaries]
        return [[self.b.shl(start, shift) for shift in self.halved(self.words, 0, 4)] for start in eight]

    def steps(self, packed: Any) -> list[list[Any]]:
        """The second half's steps stay sixteen times too large, which saves a shift; its scales are a sixteenth."""
        four = self.load(packed, ir.VectorType(I16, UNIT), 1)
        four = self.shuffled(four, four, [place % UNIT for place in range(PAIR * self.lanes)])
        both, bits = (four, self.b.lshr(four, same(self.pairs, 8))), self.halved(self.pairs, 15, 240)
        return [[self.b.and_(two, mask) for mask in bits] for two in both]

    def halved(self, kind: Any, first: int, second: int) -> list[Any]:
        """The unit's vectors with the first number for the first half of the outputs, the second for the others."""
        half = HALF * kind.count // self.lanes
        numbers = [ir.Constant(kind.element, number) for number in [first] * half + [second] * half]
        return [ir.Constant(kind, numbers[n : n + kind.count]) for n in range(0, 2 * half, kind.count)]

    def scaled(self, total: Any, sums: Any, summary: Any, scales: Any, v: int) -> Any:
        scale, zero = (self.wide(self.at(scales, 2 * (part * UNIT + v * self.lanes))) for part in (0, 1))
        own, sum_x = (self.spread(self.at(summary, 4 * n), F32, self.floats) for n in (0, 1))
        return self.fma(zero, sum_x, self.fma(self.b.fmul(scale, own), sums, total))


class Int8Tile(Tile):
    """A unit's weights (inputs / 2, 16, 2) int8, scales (groups, 16) bfloat16: totals are sums of scale · Σ step · x
    over a group"""

    group_bytes, scale_bytes = GROUP * UNIT, 2 * UNIT

    def starts(self, summaries: list[Any]) -> list[list[Any]]:
        return [[same(self.words, 0) for _ in self.vectors] for _ in summaries]

    def steps(self, packed: Any) -> list[list[Any]]:
        size, number = PAIR * self.lanes, len(self.vectors)
        places = [self.at(packed, n, size) for n in range(number * QUAD // PAIR)]
        wide = [self.b.sext(self.load(place, self.bytes, 1), self.pairs) for place in places]
        return [wide[n : n + number] for n in range(0, len(wide), number)]

    def scaled(self, total: Any, sums: Any, summary: Any, scales: Any, v: int) -> Any:
        own = self.spread(self.at(summary, 0), F32, self.floats)
        return self.fma(self.b.fmul(self.wide(self.at(scales, 2 * v * self.lanes)), own), sums, total)
