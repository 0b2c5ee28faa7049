"""What differs by machine, and the one choice of it."""

from __future__ import annotations

from .forward.attention import has_numba
from .weights.int4 import FewBitKernels


def few_bit_kernels() -> FewBitKernels:
    """This machine's own, for weights of few bits on a CPU: Numba's where it is installed."""
    if not has_numba():
        return FewBitKernels()
    from .cpu.few_bits import few_bit_parts
    from .cpu.int_products import NativeInt4Linear
    from .cpu.warm_up import kernels_ahead

    return FewBitKernels(few_bit_parts, NativeInt4Linear, kernels_ahead)
