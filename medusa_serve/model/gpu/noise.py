"""The keyed noise of sampling/noise.py inside Triton kernels."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch has no Triton
    triton = None

if triton is not None:

    @triton.jit
    def _mix(x):
        """As in sampling/noise.py, on uint32."""
        x = (x ^ (x >> 16)) * 0x85EBCA6B
        x = (x ^ (x >> 13)) * 0xC2B2AE35
        return x ^ (x >> 16)

    @triton.jit
    def _gumbel(seed, position, token):
        """As in sampling/noise.py: the same bits, logarithms equal up to rounding."""
        golden = tl.full([], 0x9E3779B9, tl.uint32)
        low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        position = position.to(tl.uint32)
        first = _mix(_mix(_mix(low + golden) ^ high) + position * golden)
        second = _mix(_mix(_mix(high + 0x85EBCA6B) ^ low) ^ (position * 0xC2B2AE35))
        bits = _mix(_mix(token.to(tl.uint32) * golden + first) ^ second)
        v = tl.minimum(
            bits.to(tl.float32) * 2.3283064365386963e-10 + 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08
        )
        # log1p(-v), which tl lacks; by its series if v is small, as 1 - v would lose v's digits
        log1p = tl.where(v < 1e-3, -v * (1.0 + v * (0.5 + v * 0.33333333)), tl.log(1.0 - v))
        return -tl.log(-log1p)
