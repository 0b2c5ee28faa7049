"""Inputs of products as integers: a group of 32 bfloat16 numbers becomes 32 int16 numbers times one power of two.

Numbers down to a 128th of the group's largest are exact. A smaller number is rounded to a 65536th of the largest;
bfloat16's own rounding of the largest is a hundred times as coarse.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..weights.int4 import GROUP
from .base import intrinsic
from .vectors import F32, I32, LANES, Vectors, same

SUMMARY = 3  # 32-bit numbers of a group: its scale and its scaled sum, float32; minus eight times its sum, int32
MIN_EXPONENT = 15  # least float32 exponent field of a group's largest number: smaller numbers become zeros
NAN = 0x7FC00000
ROUND_BY_ADDING = 0x4B400000  # 1.5 · 2²³: in a sum with it, the last bits are the other number, rounded


@intrinsic
def to_int16(_, x, groups, numbers, summaries):
    """Fill numbers (groups, 32) int16 and summaries (groups, SUMMARY) from x (groups, 32) bfloat16; all are addresses.
    The scale of a group with NaN or an infinite number is NaN."""

    def generate(context, builder, signature, arguments):
        _ToInt16(builder, *arguments).make()
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


class _ToInt16(Vectors):
    def __init__(self, builder: Any, x, groups, numbers, summaries) -> None:
        super().__init__(builder)
        self.x, self.groups, self.numbers, self.summaries = x, groups, numbers, summaries
        self._most = self.declared(f"llvm.vector.reduce.umax.v{LANES}i32", I32, [self.words])
        self._sum = self.declared(f"llvm.vector.reduce.add.v{LANES}i32", I32, [self.words])

    def make(self) -> None:
        with cgutils.for_range(self.b, self.groups) as loop:
            self.group(
                *(
                    self.at(at, loop.index, self.word(size))
                    for at, size in ((self.x, 2 * GROUP), (self.numbers, 2 * GROUP), (self.summaries, 4 * SUMMARY))
                )
            )

    def group(self, x: Any, numbers: Any, summary: Any) -> None:
        b, parts = self.b, range(GROUP // LANES)
        words = [b.bitcast(self.wide(self.at(x, part, self.word(2 * LANES))), self.words) for part in parts]
        largest = [b.and_(word, same(self.words, 0x7FFFFFFF)) for word in words]
        for _ in range(2):
            largest = [self.larger(one, other) for one, other in zip(largest[::2], largest[1::2], strict=True)]
        exponent = b.lshr(b.call(self._most, [*largest]), ir.Constant(I32, 23))
        exponent = self.larger(exponent, ir.Constant(I32, MIN_EXPONENT))
        up = self.filled(self.power(b.sub(ir.Constant(I32, 268), exponent)), self.floats)
        total = same(self.words, 0)
        for part, word in zip(parts, words, strict=True):
            moved = b.fadd(b.fmul(self.as_floats(word), up), self.as_floats(same(self.words, ROUND_BY_ADDING)))
            steps = b.sub(b.bitcast(moved, self.words), same(self.words, ROUND_BY_ADDING))
            self.store(self.at(numbers, part, self.word(2 * LANES)), b.trunc(steps, self.halves), 2)
            total = b.add(total, steps)
        found = b.call(self._sum, [total])
        good = b.icmp_unsigned("<", exponent, ir.Constant(I32, 255))
        nan = b.bitcast(ir.Constant(I32, NAN), F32)
        scale = b.select(good, self.power(b.sub(exponent, ir.Constant(I32, 14))), nan)
        self.store(summary, scale)
        self.store(self.at(summary, 4), b.fmul(scale, b.sitofp(found, F32)))
        self.store(self.at(summary, 8), b.mul(found, ir.Constant(I32, -8)))

    def larger(self, one: Any, other: Any) -> Any:
        return self.b.select(self.b.icmp_unsigned(">", one, other), one, other)

    def power(self, exponent: Any) -> Any:
        """The float32 power of two with this exponent field."""
        return self.b.bitcast(self.b.shl(exponent, ir.Constant(I32, 23)), F32)
