"""LLVM's vectors of eight or sixteen numbers, for kernels where Numba's code for loops is slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 8  # numbers in a vector, unless a kernel asks for more
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def same(kind: ir.VectorType, number: float) -> ir.Constant:
    return ir.Constant(kind, [ir.Constant(kind.element, number)] * kind.count)


class Vectors:
    """Writes instructions through a builder. Addresses are int64."""

    def __init__(self, builder: Any, lanes: int = LANES) -> None:
        self.b, self.lanes = builder, lanes
        self.halves, self.words, self.floats = (ir.VectorType(kind, lanes) for kind in (I16, I32, F32))
        self._fma = self.declared(f"llvm.fma.v{lanes}f32", self.floats, [self.floats] * 3)
        self._fetch = self.declared("llvm.prefetch.p0", ir.VoidType(), [I8.as_pointer(), I32, I32, I32])

    def declared(self, name: str, result: Any, arguments: list[Any]) -> Any:
        return cgutils.get_or_insert_function(self.b.module, ir.FunctionType(result, arguments), name)

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

    def ask_for(self, address: Any) -> None:
        """Prefetch the cache line at an address, which need not be valid."""
        where = self.b.inttoptr(address, I8.as_pointer())
        self.b.call(self._fetch, [where, *(ir.Constant(I32, number) for number in (0, 3, 1))])

    def wide(self, address: Any) -> Any:
        """bfloat16 → float32"""
        halves = self.b.zext(self.load(address, self.halves, 2), self.words)
        return self.as_floats(self.b.shl(halves, same(self.words, 16)))

    def spread(self, address: Any, kind: Any, vector: Any) -> Any:
        """A vector filled with the number at an address."""
        return self.filled(self.load(address, kind, 4), vector)

    def filled(self, number: Any, vector: Any) -> Any:
        nothing = ir.Constant(vector, ir.Undefined)
        places = same(ir.VectorType(I32, vector.count), 0)
        return self.b.shuffle_vector(self.b.insert_element(nothing, number, ir.Constant(I32, 0)), nothing, places)

    def two_wide(self, address: Any) -> tuple[Any, Any]:
        """Twice as many bfloat16 → float32: the even and the odd elements. Keeping their order would cost more."""
        both = self.load(address, self.words, 2)
        odd = self.b.and_(both, same(self.words, 0xFFFF0000))
        return self.as_floats(self.b.shl(both, same(self.words, 16))), self.as_floats(odd)

    def as_floats(self, words: Any) -> Any:
        return self.b.bitcast(words, self.floats)

    def shuffled(self, a: Any, b: Any, places: Iterable[int]) -> Any:
        """Elements of two vectors by their indices; b's come after a's."""
        mask = [ir.Constant(I32, place) for place in places]
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(mask)), mask))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.b.call(self._fma, [a, b, c])

    def store(self, address: Any, value: Any, align: int = 4) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = align

    def variables(self, count: int, first: Any) -> list[Any]:
        """`count` variables with this initial value; loops may change them."""
        found = [cgutils.alloca_once(self.b, first.type) for _ in range(count)]
        for each in found:
            self.b.store(first, each)
        return found

    def keep(self, address: Any, numbers: Any) -> None:
        """Store float32 as bfloat16, rounded like base.half"""
        b, bits = self.b, self.b.bitcast(numbers, self.words)
        odd = b.and_(b.lshr(bits, same(self.words, 16)), same(self.words, 1))
        rounded = b.lshr(b.add(b.add(bits, same(self.words, 0x7FFF)), odd), same(self.words, 16))
        number = b.icmp_unsigned("<=", b.and_(bits, same(self.words, 0x7FFFFFFF)), same(self.words, 0x7F800000))
        halves = b.trunc(b.select(number, rounded, same(self.words, 0x7FC0)), self.halves)
        self.store(address, halves, 2)
