"""Products of a few rows with int4 and int8 weights, as LLVM's vectors: what Numba makes of loops over such weights
takes three times as long.

Weights are whole numbers, and so are the inputs: a group of 32 is its numbers of 16 bits and one scale, a power of two
(native_whole.py). A vector holds the products of eight output rows, summed up as 32-bit integers, which know no
order: a row's sums are bitwise the same whatever the others are, and whatever the tile. A tile is some rows by a unit
of 16 outputs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config

from .int4 import GROUP
from .native import intrinsic
from .native_vectors import F32, FLOATS, I8, I16, I32, LANES, WORDS, Vectors, same
from .native_whole import FACTS

UNIT = 16  # output rows that lie together
PAIR = 2  # inputs whose products with a weight's row are one integer
QUAD = 4  # inputs that a step goes over
LINE = 64  # bytes of a cache line
BYTES, PAIRS, BOTH = (ir.VectorType(kind, PAIR * LANES) for kind in (I8, I16, I32))


def tile(kind: type[Tile], rows: int) -> Any:
    @intrinsic
    def run(_, x, inputs, facts, packed, scales, out, outputs):
        """Addresses of x (M, inputs) int16 and facts (M, groups, FACTS) as native_whole.py gives them, the weights of a
        unit, its scales, and out (M, outputs) bfloat16"""

        def generate(context, builder, signature, arguments):
            kind(builder, rows, *arguments).make()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return run


def has_pair_products() -> bool:
    """Whether this processor multiplies sixteen pairs of numbers of 16 bits, and adds up each two, at once."""
    told: Any = config  # Numba's settings may name another processor, or forbid instructions of this one
    as_it_is = told.CPU_NAME is None and told.CPU_FEATURES is None and told.ENABLE_AVX
    return bool(as_it_is and binding.get_host_cpu_features().get("avx2"))


class Tile(Vectors):
    """The instructions of a tile, made of those of a group of inputs."""

    group_bytes: int  # of a unit's weights
    scale_bytes: int  # of a unit's scales, of a group

    def __init__(self, builder: Any, rows: int, x, inputs, facts, packed, scales, out, outputs) -> None:
        super().__init__(builder)
        self.rows = range(rows)
        self.groups = builder.udiv(inputs, self.word(GROUP))
        self.x = [self.at(x, r, inputs, 2) for r in self.rows]
        self.facts = [self.at(facts, r, self.groups, 4 * FACTS) for r in self.rows]
        self.packed, self.scales = packed, scales
        self.out = [self.at(out, r, outputs, 2) for r in self.rows]
        pairs = self.declared("llvm.x86.avx2.pmadd.wd", WORDS, [PAIRS] * 2) if has_pair_products() else None
        self._pair_products = pairs

    def make(self) -> None:
        b = self.b
        totals = [[cgutils.alloca_once(b, FLOATS) for _ in range(2)] for _ in self.rows]
        for total in (each for row in totals for each in row):
            b.store(same(FLOATS, 0.0), total)
        with cgutils.for_range(b, self.groups) as loop:
            x = [self.at(row, loop.index, self.word(2 * GROUP)) for row in self.x]
            facts = [self.at(row, loop.index, self.word(4 * FACTS)) for row in self.facts]
            packed = self.at(self.packed, loop.index, self.word(self.group_bytes))
            scales = self.at(self.scales, loop.index, self.word(self.scale_bytes))
            self.fetch(packed, self.group_bytes)
            self.fetch(scales, self.scale_bytes)
            found = self.summed_up(x, packed, self.starts(facts))
            for r in self.rows:
                for v, total in enumerate(totals[r]):
                    value = self.scaled(b.load(total), b.sitofp(found[r][v], FLOATS), facts[r], scales, v)
                    b.store(value, total)
        for r, row in enumerate(totals):
            for v, total in enumerate(row):
                self.keep(self.at(self.out[r], 2 * LANES * v), b.load(total))

    def summed_up(self, x: list[Any], packed: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """Each row's two sums of a group, from where they start."""
        b = self.b
        for quad in range(GROUP // QUAD):
            pairs = self.steps(self.at(packed, quad, self.word(self.group_bytes * QUAD // GROUP)))
            for pair, steps in enumerate(pairs, quad * QUAD // PAIR):
                for r in self.rows:
                    numbers = self.spread(self.at(x[r], 2 * PAIR * pair), I32, WORDS)
                    sums[r] = [
                        b.add(old, self.products(numbers, step)) for old, step in zip(sums[r], steps, strict=True)
                    ]
                sums = self.fenced(sums)
        return sums

    def fenced(self, sums: list[list[Any]]) -> list[list[Any]]:
        """The same, here and all at once: LLVM alone takes a group's products in an order for which there are not
        registers enough."""
        if self._pair_products is None:
            return sums
        every = [each for row in sums for each in row]
        kind = ir.FunctionType(ir.LiteralStructType([WORDS] * len(every)), [WORDS] * len(every))
        places = ",".join(["=x"] * len(every) + [str(n) for n in range(len(every))])
        held = self.b.asm(kind, "", places, every, True)
        found = [self.b.extract_value(held, n) for n in range(len(every))]
        return [found[n : n + 2] for n in range(0, len(found), 2)]

    def starts(self, facts: list[Any]) -> list[list[Any]]:
        """What each row's sums of a group begin with, for both vectors."""
        raise NotImplementedError

    def steps(self, packed: Any) -> list[tuple[Any, Any]]:
        """Of QUAD inputs, two by two, by the unit's two vectors of outputs, 16 bits each."""
        raise NotImplementedError

    def scaled(self, total: Any, sums: Any, facts: Any, scales: Any, v: int) -> Any:
        """A row's total of a vector with a group's sums."""
        raise NotImplementedError

    def products(self, numbers: Any, steps: Any) -> Any:
        """Of pairs of 16 bits, each two added: (8) int32"""
        numbers = self.b.bitcast(numbers, PAIRS)
        if self._pair_products is not None:
            return self.b.call(self._pair_products, [numbers, steps])
        every = self.b.mul(self.b.sext(numbers, BOTH), self.b.sext(steps, BOTH))
        even, odd = (self.shuffled(every, every, range(p, PAIR * LANES, PAIR)) for p in range(PAIR))
        return self.b.add(even, odd)

    def fetch(self, place: Any, size: int) -> None:
        """Ask for what the next unit's tile reads of this group: the hardware alone does not come after."""
        ahead = self.at(place, self.groups, self.word(size))
        for line in range(0, size, LINE):
            self.ask_for(self.at(ahead, line))


class Int4Tile(Tile):
    """A unit's weights (inputs / 4, 8, 2, 2) uint8 as NativeInt4Linear.arranged has them, scales (groups, 2, 16)
    bfloat16: totals are sums of scale · Σ (step - 8) · x + zero · Σ x over a group"""

    group_bytes, scale_bytes = GROUP * UNIT // 2, 4 * UNIT

    def starts(self, facts: list[Any]) -> list[list[Any]]:
        eight = [self.spread(self.at(fact, 8), I32, WORDS) for fact in facts]
        return [[start, self.b.shl(start, same(WORDS, 4))] for start in eight]

    def steps(self, packed: Any) -> list[tuple[Any, Any]]:
        """The second vector's are sixteen times as large: a shift less, and its scales are so much smaller."""
        four = self.load(packed, PAIRS, 1)
        both = four, self.b.lshr(four, same(PAIRS, 8))
        return [(self.b.and_(two, same(PAIRS, 15)), self.b.and_(two, same(PAIRS, 240))) for two in both]

    def scaled(self, total: Any, sums: Any, facts: Any, scales: Any, v: int) -> Any:
        scale, zero = (self.wide(self.at(scales, 2 * (part * UNIT + v * LANES))) for part in (0, 1))
        own, whole = (self.spread(self.at(facts, 4 * n), F32, FLOATS) for n in (0, 1))
        return self.fma(zero, whole, self.fma(self.b.fmul(scale, own), sums, total))


class Int8Tile(Tile):
    """A unit's weights (inputs / 2, 16, 2) int8, scales (groups, 16) bfloat16: totals are sums of scale · Σ step · x
    over a group"""

    group_bytes, scale_bytes = GROUP * UNIT, 2 * UNIT

    def starts(self, facts: list[Any]) -> list[list[Any]]:
        return [[same(WORDS, 0)] * 2 for _ in facts]

    def steps(self, packed: Any) -> list[tuple[Any, Any]]:
        vectors = [self.load(self.at(packed, n, PAIR * LANES), BYTES, 1) for n in range(2 * QUAD // PAIR)]
        wide = [self.b.sext(vector, PAIRS) for vector in vectors]
        return list(zip(wide[::2], wide[1::2], strict=True))

    def scaled(self, total: Any, sums: Any, facts: Any, scales: Any, v: int) -> Any:
        own = self.spread(self.at(facts, 0), F32, FLOATS)
        return self.fma(self.b.fmul(self.wide(self.at(scales, 2 * v * LANES)), own), sums, total)
