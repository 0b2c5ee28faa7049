"""Inputs of products as whole numbers: a group of 32 bfloat16 numbers is 32 of 16 bits times one power of two.

Exact from the group's largest number down to its 128th part; smaller ones are rounded to a 65536th of the largest, a
hundredth of what bfloat16 has rounded of that one.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..weights.int4 import GROUP
from .base import intrinsic
from .vectors import F32, I32, LANES, Vectors, same

FACTS = 3  # of a group: its scale and its scaled sum, float32, and minus eight times its sum, int32
LEAST = 15  # exponent, as float32 has it, of a group's largest number at least: what is smaller are zeros
NO_NUMBER = 0x7FC00000
MIDDLE = 0x4B400000  # 1.5 · 2²³: of a sum with it, the last bits are the rounded whole part


@intrinsic
def whole(_, x, groups, numbers, facts):
    """Addresses of x (groups, 32) bfloat16, numbers (groups, 32) int16 and facts (groups, FACTS), filled. Of a group
    with a number that is none, or infinite, the scale is none."""

    def generate(context, builder, signature, arguments):
        _Whole(builder, *arguments).make()
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


class _Whole(Vectors):
    def __init__(self, builder: Any, x, groups, numbers, facts) -> None:
        super().__init__(builder)
        self.x, self.groups, self.numbers, self.facts = x, groups, numbers, facts
        self._most = self.declared(f"llvm.vector.reduce.umax.v{LANES}i32", I32, [self.words])
        self._sum = self.declared(f"llvm.vector.reduce.add.v{LANES}i32", I32, [self.words])

    def make(self) -> None:
        with cgutils.for_range(self.b, self.groups) as loop:
            self.group(
                *(
                    self.at(at, loop.index, self.word(size))
                    for at, size in ((self.x, 2 * GROUP), (self.numbers, 2 * GROUP), (self.facts, 4 * FACTS))
                )
            )

    def group(self, x: Any, numbers: Any, facts: Any) -> None:
        b, parts = self.b, range(GROUP // LANES)
        words = [b.bitcast(self.wide(self.at(x, part, self.word(2 * LANES))), self.words) for part in parts]
        largest = [b.and_(word, same(self.words, 0x7FFFFFFF)) for word in words]
        for _ in range(2):
            largest = [self.larger(one, other) for one, other in zip(largest[::2], largest[1::2], strict=True)]
        exponent = self.larger(b.lshr(b.call(self._most, [*largest]), ir.Constant(I32, 23)), ir.Constant(I32, LEAST))
        up = self.filled(self.power(b.sub(ir.Constant(I32, 268), exponent)), self.floats)
        total = same(self.words, 0)
        for part, word in zip(parts, words, strict=True):
            moved = b.fadd(b.fmul(self.as_floats(word), up), self.as_floats(same(self.words, MIDDLE)))
            steps = b.sub(b.bitcast(moved, self.words), same(self.words, MIDDLE))
            self.store(self.at(numbers, part, self.word(2 * LANES)), b.trunc(steps, self.halves), 2)
            total = b.add(total, steps)
        found = b.call(self._sum, [total])
        good = b.icmp_unsigned("<", exponent, ir.Constant(I32, 255))
        none = b.bitcast(ir.Constant(I32, NO_NUMBER), F32)
        scale = b.select(good, self.power(b.sub(exponent, ir.Constant(I32, 14))), none)
        self.store(facts, scale)
        self.store(self.at(facts, 4), b.fmul(scale, b.sitofp(found, F32)))
        self.store(self.at(facts, 8), b.mul(found, ir.Constant(I32, -8)))

    def larger(self, one: Any, other: Any) -> Any:
        return self.b.select(self.b.icmp_unsigned(">", one, other), one, other)

    def power(self, exponent: Any) -> Any:
        """The power of two of this exponent, as float32 has it."""
        return self.b.bitcast(self.b.shl(exponent, ir.Constant(I32, 23)), F32)
