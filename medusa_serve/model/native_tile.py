"""Products of a few rows with int4 and int8 weights, as LLVM's vectors: what Numba makes of loops over such weights
takes three times as long.

A vector holds the same input of eight output rows: steps become float32 and are multiplied by one input after the
other, summed up in the order of the inputs by fused multiply-adds alone. So a row's sums are bitwise the same whatever
the others are, and whatever the tile. A tile is some rows by some units of 16 outputs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .int4 import GROUP
from .native import intrinsic

UNIT, LANES = 16, 8  # output rows that lie together, and of a vector
PAIRS = GROUP // 2  # inputs whose int4 steps share bytes, of a group
LINE = 64  # bytes of a cache line
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES, HALVES, WORDS, FLOATS = (ir.VectorType(kind, LANES) for kind in (I8, I16, I32, F32))


def tile(kind: type[Tile], rows: int, units: int) -> Any:
    @intrinsic
    def run(_, x, inputs, sums, packed, scales, out, outputs):
        """Addresses of x (M, inputs) float32, sums (M, groups) float32: of each group's inputs, the weights' first
        unit and its scales, and out (M, outputs) bfloat16"""

        def generate(context, builder, signature, arguments):
            kind(builder, rows, units, *arguments).make()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return run


def _same(kind: ir.VectorType, number: float) -> ir.Constant:
    return ir.Constant(kind, [ir.Constant(kind.element, number)] * LANES)


class Tile:
    """The instructions of a tile, made of those of a group of inputs."""

    group_bytes: int  # of a unit's weights
    scale_bytes: int  # of a unit's scales, of a group

    def __init__(self, builder: Any, rows: int, units: int, x, inputs, sums, packed, scales, out, outputs) -> None:
        self.b, self.rows, self.vectors = builder, range(rows), range(2 * units)
        self.groups = builder.udiv(inputs, self.word(GROUP))
        self.unit = self.at(self.word(0), self.groups, self.word(self.group_bytes))
        self.scale_unit = self.at(self.word(0), self.groups, self.word(self.scale_bytes))
        self.x = [self.at(x, r, inputs, 4) for r in self.rows]
        self.sums = [self.at(sums, r, self.groups, 4) for r in self.rows]
        self.packed = [self.at(packed, u, self.unit) for u in range(units)]
        self.scales = [self.at(scales, u, self.scale_unit) for u in range(units)]
        self.out = [self.at(out, r, outputs, 2) for r in self.rows]
        self._fma = self._declared(f"llvm.fma.v{LANES}f32", FLOATS, [FLOATS] * 3)
        self._fetch = self._declared("llvm.prefetch.p0", ir.VoidType(), [I8.as_pointer(), I32, I32, I32])

    def _declared(self, name: str, result: Any, arguments: list[Any]) -> Any:
        return cgutils.get_or_insert_function(self.b.module, ir.FunctionType(result, arguments), name)

    def make(self) -> None:
        b, zero = self.b, _same(FLOATS, 0.0)
        totals = [[cgutils.alloca_once(b, FLOATS) for _ in self.vectors] for _ in self.rows]
        for total in (each for row in totals for each in row):
            b.store(zero, total)
        with cgutils.for_range(b, self.groups) as loop:
            found = self.group(loop.index, [[b.load(total) for total in row] for row in totals])
            for row, values in zip(totals, found, strict=True):
                for total, value in zip(row, values, strict=True):
                    b.store(value, total)
        for r, row in enumerate(totals):
            for v, total in enumerate(row):
                self.keep(self.at(self.out[r], 2 * LANES * v), b.load(total))

    def group(self, group: Any, totals: list[list[Any]]) -> list[list[Any]]:
        """Each row's and vector's totals with the products of a group's inputs added."""
        raise NotImplementedError

    def places(self, group: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """Of each row's inputs and of each unit's weights and scales of a group; the next tile's are asked for."""
        x = [self.at(row, group, self.word(4 * GROUP)) for row in self.x]
        packed = [self.at(unit, group, self.word(self.group_bytes)) for unit in self.packed]
        scales = [self.at(unit, group, self.word(self.scale_bytes)) for unit in self.scales]
        self.fetch(packed, self.group_bytes, self.unit)
        self.fetch(scales, self.scale_bytes, self.scale_unit)
        return x, packed, scales

    def fetch(self, places: list[Any], size: int, unit: Any) -> None:
        """Ask for what the next tile reads of this group: the hardware alone does not come after."""
        for place in places:
            ahead = self.at(place, len(places), unit)
            for line in range(0, size, LINE):
                where = self.b.inttoptr(self.at(ahead, line), I8.as_pointer())
                self.b.call(self._fetch, [where, *(ir.Constant(I32, number) for number in (0, 3, 1))])

    def word(self, number: int) -> ir.Constant:
        return ir.Constant(I64, number)

    def at(self, address: Any, count: Any, size: Any = 1, width: int = 1) -> Any:
        """address + count · size · width"""
        count, size = (self.word(n) if isinstance(n, int) else n for n in (count, size))
        return self.b.add(address, self.b.mul(self.b.mul(count, size), self.word(width)))

    def load(self, address: Any, kind: Any, align: int) -> Any:
        value = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def wide(self, address: Any) -> Any:
        """bfloat16 → float32"""
        halves = self.b.zext(self.load(address, HALVES, 2), WORDS)
        return self.b.bitcast(self.b.shl(halves, _same(WORDS, 16)), FLOATS)

    def spread(self, address: Any) -> Any:
        nothing = ir.Constant(FLOATS, ir.Undefined)
        first = self.b.insert_element(nothing, self.load(address, F32, 4), ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, nothing, _same(WORDS, 0))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.b.call(self._fma, [a, b, c])

    def keep(self, address: Any, numbers: Any) -> None:
        """float32 → bfloat16 as native.half"""
        b, bits = self.b, self.b.bitcast(numbers, WORDS)
        odd = b.and_(b.lshr(bits, _same(WORDS, 16)), _same(WORDS, 1))
        rounded = b.lshr(b.add(b.add(bits, _same(WORDS, 0x7FFF)), odd), _same(WORDS, 16))
        number = b.icmp_unsigned("<=", b.and_(bits, _same(WORDS, 0x7FFFFFFF)), _same(WORDS, 0x7F800000))
        halves = b.trunc(b.select(number, rounded, _same(WORDS, 0x7FC0)), HALVES)
        b.store(halves, b.inttoptr(address, HALVES.as_pointer())).align = 2


class Int4Tile(Tile):
    """A unit's weights (inputs / 2, 16) uint8, two inputs' steps in a byte, scales (groups, 2, 16) bfloat16: totals are
    sums of scale · Σ (step - 8) · x + zero · Σ x over a group"""

    group_bytes, scale_bytes = PAIRS * UNIT, 4 * UNIT

    def group(self, group: Any, totals: list[list[Any]]) -> list[list[Any]]:
        x, packed, scales = self.places(group)
        sums = [self.spread(self.at(row, group, self.word(4))) for row in self.sums]
        products = [[_same(FLOATS, 0.0)] * len(self.vectors) for _ in self.rows]
        for pair in range(PAIRS):
            steps = [self._steps(self.at(packed[v // 2], pair * UNIT + v % 2 * LANES)) for v in self.vectors]
            for odd in (0, 1):
                for r in self.rows:
                    number = self.spread(self.at(x[r], 4 * (2 * pair + odd)))
                    products[r] = [self.fma(number, steps[v][odd], products[r][v]) for v in self.vectors]
        found = [list(row) for row in totals]
        for v in self.vectors:
            scale, zero = (self.wide(self.at(scales[v // 2], 2 * (part * UNIT + v % 2 * LANES))) for part in (0, 1))
            for r in self.rows:
                centred = self.fma(_same(FLOATS, -8.0), sums[r], products[r][v])
                found[r][v] = self.fma(zero, sums[r], self.fma(scale, centred, found[r][v]))
        return found

    def _steps(self, address: Any) -> tuple[Any, Any]:
        """Of two inputs."""
        both = self.b.zext(self.load(address, BYTES, 1), WORDS)
        low, high = self.b.and_(both, _same(WORDS, 15)), self.b.lshr(both, _same(WORDS, 4))
        return self.b.sitofp(low, FLOATS), self.b.sitofp(high, FLOATS)


class Int8Tile(Tile):
    """A unit's weights (inputs, 16) int8, scales (groups, 16) bfloat16: totals are sums of scale · Σ step · x over a
    group"""

    group_bytes, scale_bytes = GROUP * UNIT, 2 * UNIT

    def group(self, group: Any, totals: list[list[Any]]) -> list[list[Any]]:
        x, packed, scales = self.places(group)
        products = [[_same(FLOATS, 0.0)] * len(self.vectors) for _ in self.rows]
        for place in range(GROUP):
            found = (self.load(self.at(packed[v // 2], place * UNIT + v % 2 * LANES), BYTES, 1) for v in self.vectors)
            steps = [self.b.sitofp(self.b.sext(each, WORDS), FLOATS) for each in found]
            for r in self.rows:
                number = self.spread(self.at(x[r], 4 * place))
                products[r] = [self.fma(number, steps[v], products[r][v]) for v in self.vectors]
        scale = [self.wide(self.at(scales[v // 2], 2 * (v % 2 * LANES))) for v in self.vectors]
        return [[self.fma(scale[v], products[r][v], totals[r][v]) for v in self.vectors] for r in self.rows]
